// Runs lists of ops.
#include <omp.h>

#include <cstdio>
#include <mutex>

#include "cores.h"
#include "dot.h"
#include "kernels.h"
#include "ranks.h"
#include "team_size.h"

#if defined(OCTAVO_AMX)
#include "amx.h"
#endif

namespace octavo {

namespace {

thread_local Scratch thread_scratch;

// Memory shared by the threads of a call.
class Workspace {
public:
    char* reserve(size_t bytes) {
        if (bytes > size_) {
            std::free(memory_);
            size_ = (bytes + kCacheLine - 1) / kCacheLine * kCacheLine;
            memory_ = static_cast<char*>(std::aligned_alloc(kCacheLine, size_));
            if (!memory_) throw std::bad_alloc();
        }
        return memory_;
    }

private:
    char* memory_ = nullptr;
    size_t size_ = 0;
};

// What a call uses beside its threads.
struct Caller {
    Workspace workspace;
    TeamSize team_size;
};

// Callers take turns. Ranks do not, as they wait for each other, so those that are threads of a process have their own.
std::mutex run_mutex;
Caller all_callers;
thread_local Caller rank_caller;
double* profile = nullptr;
int profiled_threads = 0;

void run_op(const OctavoNode& node, const OctavoStep& step, const Team& team) {
    switch (node.op) {
        case kOpEmbedding:
            return run_embedding(*static_cast<const OctavoEmbedding*>(node.args), step, team);
        case kOpLinear:
            return run_linear(*static_cast<const OctavoLinear*>(node.args), step, team);
        case kOpRmsNorm:
            return run_rms_norm(*static_cast<const OctavoNorm*>(node.args), step, team);
        case kOpLayerNorm:
            return run_layer_norm(*static_cast<const OctavoNorm*>(node.args), step, team);
        case kOpRotary:
            return run_rotary(*static_cast<const OctavoRotary*>(node.args), step, team);
        case kOpAttention:
            return run_attention(*static_cast<const OctavoAttention*>(node.args), step, team);
        case kOpActAndMul:
            return run_act_and_mul(*static_cast<const OctavoPointwise*>(node.args), step, team);
        case kOpActivation:
            return run_activation(*static_cast<const OctavoPointwise*>(node.args), step, team);
        case kOpAdd:
            return run_add(*static_cast<const OctavoPointwise*>(node.args), step, team);
        case kOpMultiply:
            return run_multiply(*static_cast<const OctavoPointwise*>(node.args), step, team);
        case kOpGatherRows:
            return run_gather_rows(*static_cast<const OctavoPointwise*>(node.args), step, team);
        case kOpShortConv:
            return run_short_conv(*static_cast<const OctavoShortConv*>(node.args), step, team);
        case kOpRoute:
            return run_route(*static_cast<const OctavoRoute*>(node.args), step, team);
        case kOpExperts:
            return run_experts(*static_cast<const OctavoExperts*>(node.args), step, team);
        case kOpGatedDelta:
            return run_gated_delta(*static_cast<const OctavoGatedDelta*>(node.args), step, team);
        case kOpMamba:
            return run_mamba(*static_cast<const OctavoMamba*>(node.args), step, team);
        case kOpHeadsLinear:
            return run_heads_linear(*static_cast<const OctavoHeadsLinear*>(node.args), step, team);
        case kOpLatentAttention:
            return run_latent_attention(*static_cast<const OctavoLatentAttention*>(node.args), step, team);
        default:
            std::fprintf(stderr, "octavo: unknown op %d\n", node.op);
            std::abort();
    }
}

size_t workspace_bytes(const OctavoNode* nodes, int count, const OctavoStep& step, int threads) {
    size_t bytes = 0;
    for (int i = 0; i < count; ++i) {
        size_t wanted = 0;
        if (nodes[i].op == kOpLinear)
            wanted = linear_workspace(*static_cast<const OctavoLinear*>(nodes[i].args), step);
        else if (nodes[i].op == kOpAttention)
            wanted = attention_workspace(*static_cast<const OctavoAttention*>(nodes[i].args), step, threads);
        else if (nodes[i].op == kOpLatentAttention)
            wanted =
                latent_attention_workspace(*static_cast<const OctavoLatentAttention*>(nodes[i].args), step, threads);
        else if (nodes[i].op == kOpMamba)
            wanted = mamba_workspace(*static_cast<const OctavoMamba*>(nodes[i].args), step);
        else if (nodes[i].op == kOpExperts)
            wanted = experts_workspace(*static_cast<const OctavoExperts*>(nodes[i].args), step);
        if (wanted > bytes) bytes = wanted;
    }
    return bytes;
}

void run_list(const OctavoNode* nodes, int count, const OctavoStep& step, const Team& team) {
    double* times = team.index < profiled_threads ? profile + 2 * team.index : nullptr;
    for (int i = 0; i < count; ++i) {
        if (times) times[0] = seconds();
        run_op(nodes[i], step, team);
        team.scratch.reset();
        if (times) times[1] = seconds();
        if (nodes[i].meets)
            wait(team, *step.ranks);
        else if (i + 1 < count)
            team.wait();
        if (times) times += 2 * profiled_threads;
    }
    release_tiles();
}

// Tells calls apart that take longer than others: other lists, and twice as many tokens or more.
uint64_t work_of(const OctavoNode* nodes, const OctavoStep& step) {
    int bits = 0;
    while (step.num_tokens >> bits) ++bits;
    return address_of(nodes) * 32 + static_cast<uint64_t>(bits);
}

void run(const OctavoNode* nodes, int count, const OctavoStep& step, int most, Caller& caller) {
    const double now = seconds();
    const int threads = caller.team_size.next(most, now, work_of(nodes, step));
    Shared shared;
    shared.workspace = caller.workspace.reserve(workspace_bytes(nodes, count, step, threads));
    std::vector<Taken> taken(2 * static_cast<size_t>(threads));
    shared.taken = taken.data();
    double asleep = 0.0;
    if (threads == 1) {
        run_list(nodes, count, step, {0, 1, shared, thread_scratch, asleep});
        if (most > 1) caller.team_size.saw_rest(seconds(), seconds() - now);
        return;
    }
    Cores cores(threads);
    const double begin = seconds();
    double stolen = 0.0;
#pragma omp parallel num_threads(threads) reduction(+ : asleep, stolen)
    {
        double slept = 0.0;
        const double cpu = cpu_seconds();
        cores.take(omp_get_thread_num());
        run_list(nodes, count, step, {omp_get_thread_num(), omp_get_num_threads(), shared, thread_scratch, slept});
        stolen = std::max(0.0, (seconds() - begin) - (cpu_seconds() - cpu) - slept);
        asleep = slept;
    }
    const double end = seconds();
    if (threads < most) return caller.team_size.saw_rest(end, end - begin);
    caller.team_size.saw(end, end - begin, stolen, asleep / (threads - 1));
}

}  // namespace

}  // namespace octavo

using namespace octavo;

int32_t octavo_run(const OctavoNode* nodes, int32_t count, const OctavoStep* step, int32_t max_threads) {
    int most = omp_get_max_threads();
    if (max_threads > 0 && max_threads < most) most = max_threads;
    if (step->ranks) {
        run(nodes, count, *step, most, rank_caller);
        return static_cast<const MeetingPlace*>(step->ranks->place)->is_broken.load() ? 1 : 0;
    }
    const std::lock_guard<std::mutex> lock(run_mutex);
    run(nodes, count, *step, most, all_callers);
    return 0;
}

void octavo_profile(double* times, int32_t threads) {
    const std::lock_guard<std::mutex> lock(run_mutex);
    profile = times;
    profiled_threads = times ? threads : 0;
}

int32_t octavo_initialize() {
#if defined(OCTAVO_AMX)
    return amx::request_permission();
#else
    return 0;
#endif
}

int64_t octavo_sizeof(int32_t op) {
    switch (op) {
        case kOpEmbedding:
            return sizeof(OctavoEmbedding);
        case kOpLinear:
            return sizeof(OctavoLinear);
        case kOpRmsNorm:
        case kOpLayerNorm:
            return sizeof(OctavoNorm);
        case kOpRotary:
            return sizeof(OctavoRotary);
        case kOpAttention:
            return sizeof(OctavoAttention);
        case kOpActAndMul:
        case kOpActivation:
        case kOpAdd:
        case kOpMultiply:
        case kOpGatherRows:
            return sizeof(OctavoPointwise);
        case kOpShortConv:
            return sizeof(OctavoShortConv);
        case kOpRoute:
            return sizeof(OctavoRoute);
        case kOpExperts:
            return sizeof(OctavoExperts);
        case kOpGatedDelta:
            return sizeof(OctavoGatedDelta);
        case kOpMamba:
            return sizeof(OctavoMamba);
        case kOpHeadsLinear:
            return sizeof(OctavoHeadsLinear);
        case kOpLatentAttention:
            return sizeof(OctavoLatentAttention);
        case -1:
            return sizeof(OctavoStep);
        case -2:
            return sizeof(OctavoGroup);
        case -3:
            return sizeof(OctavoNode);
        case -4:
            return sizeof(OctavoAdapter);
        case -5:
            return sizeof(OctavoRanks);
        default:
            return -1;
    }
}
