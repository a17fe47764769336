// Finds the last tokens of texts again and reads what followed there: the drafts of executor/speculative/suffix.py,
// which defines the results.
#include "lookup.h"

#include <algorithm>
#include <iterator>

namespace octavo::lookup {
namespace {

constexpr int32_t kNoToken = -1;
constexpr int kMaxPlaces = 16;
constexpr int kSureLength = 8;
constexpr int kChunk = 32;
constexpr int kLevelBounds[] = {2, 3, 4, 5, 7, 10, 16};

// Where the longest match continues, the latest places first.
struct Found {
    int length = 0;
    int count = 0;
    int64_t places[kMaxPlaces];
};

bool contains(const int32_t* tokens, int32_t token) {
    int32_t hits = 0;
    for (int i = 0; i < kChunk; ++i) hits |= -static_cast<int32_t>(tokens[i] == token);
    return hits != 0;
}

// Tokens before text[place] that equal the last ones of `query`, at most `most`.
int match_length(const int32_t* text, int64_t place, const int32_t* query_end, int most) {
    const int limit = static_cast<int>(std::min<int64_t>(most, place));
    int length = 1;
    while (length < limit && text[place - 1 - length] == query_end[-1 - length]) ++length;
    return length;
}

void find(const int32_t* text, int64_t size, const int32_t* query_end, int least, int most, Found& found) {
    found.length = found.count = 0;
    const int32_t token = query_end[-1];
    int best = std::max(least, 1);
    auto visit = [&](int64_t place) {
        const int length = match_length(text, place, query_end, most);
        if (length < best) return;
        if (length > best || found.length == 0) found.count = 0;
        best = found.length = length;
        if (found.count < kMaxPlaces) found.places[found.count++] = place;
    };
    int64_t end = size - 1;  // the last token has nothing behind it
    for (; end >= kChunk; end -= kChunk) {
        if (!contains(text + end - kChunk, token)) continue;
        for (int64_t i = end - 1; i >= end - kChunk; --i) {
            if (text[i] == token) visit(i + 1);
        }
    }
    for (int64_t i = end - 1; i >= 0; --i) {
        if (text[i] == token) visit(i + 1);
    }
}

int level_of(int length) {
    return static_cast<int>(std::upper_bound(std::begin(kLevelBounds), std::end(kLevelBounds), length) -
                            std::begin(kLevelBounds));
}

// The tokens that most often follow, one after the other; returns how many.
int continue_text(const int32_t* text, int64_t size, const Found& found, int limit, int32_t* tokens, int8_t* kinds) {
    int64_t places[kMaxPlaces];
    std::copy_n(found.places, found.count, places);
    int count = found.count;
    bool was_several = count > 1;
    for (int index = 0; index < limit; ++index) {
        int32_t column[kMaxPlaces];
        bool is_split = false;
        for (int i = 0; i < count; ++i) {
            column[i] = text[places[i] + index % (size - places[i])];
            is_split |= column[i] != column[0];
        }
        int32_t token = column[0];
        if (is_split) {
            int64_t most = 0;
            for (int i = 0; i < count; ++i) {
                const int64_t votes = std::count(column, column + count, column[i]);
                if (votes > most) {
                    most = votes;
                    token = column[i];
                }
            }
            int kept = 0;
            for (int i = 0; i < count; ++i) {
                if (column[i] == token) places[kept++] = places[i];
            }
            count = kept;
        }
        if (token == kNoToken) return index;
        tokens[index] = token;
        kinds[index] =
            static_cast<int8_t>(3 * level_of(found.length + index) + (is_split ? 2 : static_cast<int>(was_several)));
        was_several = count > 1;
    }
    return limit;
}

// The place of the last match, moved on by the new tokens, if they are those that followed there.
bool follow(OctavoLookup& row, int most, Found& found) {
    if (row.followed_match < kSureLength) return false;
    const int64_t added = row.num_tokens - row.followed_size;
    const int32_t* text = row.tokens;
    if (!std::equal(text + row.followed_size, text + row.num_tokens, text + row.followed_place)) return false;
    found.length = static_cast<int>(std::min<int64_t>(row.followed_match + added, most));
    found.count = 1;
    found.places[0] = row.followed_place + added;
    return true;
}

void propose(OctavoLookup& row, const OctavoLookupOptions& options, int32_t* tokens, int8_t* kinds) {
    const int32_t* end = row.tokens + row.num_tokens;
    const int most = static_cast<int>(std::min<int64_t>(options.most, row.num_tokens));
    const int32_t* text = row.tokens;
    int64_t size = row.num_tokens;
    Found found;
    row.count = 0;
    if (!follow(row, options.most, found)) {
        find(text, size, end, options.least, most, found);
        if (row.pool != nullptr && found.length < kSureLength) {
            Found other;
            find(row.pool, row.pool_size, end, std::max(options.least, found.length + 1), most, other);
            if (other.length > 0) {
                text = row.pool;
                size = row.pool_size;
                found = other;
            }
        }
    }
    row.followed_match = text == row.tokens ? found.length : 0;
    if (found.length == 0) return;
    row.followed_size = row.num_tokens;
    row.followed_place = found.places[0];
    const double allowed = std::min<double>(row.limit, std::max(1.0, options.factor * found.length));
    row.count = continue_text(text, size, found, static_cast<int>(allowed), tokens, kinds);
}

}  // namespace
}  // namespace octavo::lookup

OCTAVO_EXPORT void octavo_lookup(OctavoLookup* rows, int32_t num_rows, const OctavoLookupOptions* options,
                                 int32_t* tokens, int8_t* kinds) {
    for (int32_t index = 0; index < num_rows; ++index) {
        OctavoLookup& row = rows[index];
        if (row.limit <= 0) {
            row.count = 0;
            continue;
        }
        octavo::lookup::propose(row, *options, tokens, kinds);
        tokens += row.count;
        kinds += row.count;
    }
}

OCTAVO_EXPORT int32_t octavo_lookup_size() { return sizeof(OctavoLookup); }
