// Drafts from earlier text.
#pragma once

#include <cstdint>

#include "octavo.h"

struct OctavoLookup {  // a request
    const int32_t* tokens;
    int64_t num_tokens;   // at least one
    const int32_t* pool;  // earlier outputs, with -1 between them, or null
    int64_t pool_size;
    // The last match in the request's own text: length of the text, where it goes on, and length of the match; 0: none.
    int64_t followed_size;
    int64_t followed_place;
    int64_t followed_match;
    int32_t limit;  // most drafts
    int32_t count;  // result: drafts
};

struct OctavoLookupOptions {
    double factor;  // drafts per token of a match
    int32_t least;  // tokens of the shortest match that counts
    int32_t most;   // tokens that are compared
};

// Proposes drafts for each row, one row's after another's. `tokens` and `kinds` have room for all limits.
OCTAVO_EXPORT void octavo_lookup(OctavoLookup* rows, int32_t num_rows, const OctavoLookupOptions* options,
                                 int32_t* tokens, int8_t* kinds);
// Lets Python check its mirror of the struct.
OCTAVO_EXPORT int32_t octavo_lookup_size();
