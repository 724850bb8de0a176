/*
 * Runs the CUDA scorer on the CPU.  Reads cases from standard input and writes what each one gives to standard
 * output, both as test_score_cuda.py says; every array is on the heap in its exact size, for AddressSanitizer.
 */
#include "inflight_cuda.h"
#include "score_math.h"

#include <cuda_runtime.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <list>
#include <vector>

static std::list<std::vector<char>> heap;

template <class T>
static T *read_array(std::size_t n) {
    std::vector<char> &bytes = heap.emplace_back(n * sizeof(T));
    if (std::fread(bytes.data(), 1, bytes.size(), stdin) != bytes.size()) std::exit(4);
    return reinterpret_cast<T *>(bytes.data());
}

static ife_cuda_guard read_guard(int32_t n_features) {
    const int32_t *head = read_array<int32_t>(5); /* kind, R, M, target, target row */
    const std::size_t n = (std::size_t)n_features, m = (std::size_t)head[2];
    ife_cuda_guard judge = {};
    ife_guard &guard = judge.guard;
    guard.kind = head[0];
    guard.n_features = n_features;
    guard.n_rows = head[1];
    guard.n_components = head[2];
    judge.target = head[3];
    judge.target_row = head[4];
    judge.classes = read_array<int32_t>((std::size_t)head[1]);
    guard.offsets = read_array<int32_t>((std::size_t)head[1] + 1);
    guard.mean = read_array<float>(n);
    guard.scale = read_array<float>(n);
    guard.origin = guard.kind == IFE_SHARED ? read_array<float>(n) : nullptr;
    guard.centres = read_array<float>(m * n);
    const std::size_t triangle = ife_packed_row(n);
    guard.whitener = read_array<float>(guard.kind == IFE_DIAGONAL ? m * n
                                       : guard.kind == IFE_SHARED ? triangle
                                                                  : m * triangle);
    guard.constants = read_array<float>(m);
    return judge;
}

static void run_case(const int32_t *head) {
    const int32_t n_frames = head[3], has_logits = head[4];
    std::vector<ife_cuda_guard> guards;
    ife_cuda_params params = {};
    params.n_guards = head[0];
    params.n_features = head[1];
    params.n_classes = head[2];
    params.max_frames = n_frames;
    params.n_groups = head[5]; /* 0: what suits the guards */
    for (int32_t g = 0; g < params.n_guards; ++g) {
        guards.push_back(read_guard(params.n_features));
        const ife_guard &guard = guards.back().guard;
        params.max_rows = std::max(params.max_rows, guard.n_rows);
        params.n_vectors = std::max(params.n_vectors, guard.kind == IFE_FULL ? 3 : 2);
        if (head[5] == 0)
            params.n_groups =
                std::max(params.n_groups, ife_cuda_groups(guard.kind, guard.n_rows, guard.n_components));
    }
    params.guards = guards.data();
    const float *features = read_array<float>((std::size_t)n_frames * params.n_features);
    const float *logits = has_logits ? read_array<float>((std::size_t)n_frames * params.n_classes) : nullptr;
    std::vector<uint32_t> tickets((std::size_t)n_frames);
    std::vector<ife_cuda_verdict> verdicts((std::size_t)n_frames);
    std::vector<float> scores((std::size_t)n_frames * params.max_rows);
    params.tickets = tickets.data();
    const ife_cuda_out out = {verdicts.data(), scores.data()};
    if (ife_cuda_launch(&params, features, logits, &out, n_frames, nullptr) != 0) std::exit(6);
    /* The kernel's limit of shared memory is left alone or the device's: another thread's launch may need it all. */
    if (cuda_host_limit < 40 * 1024 || (cuda_host_limit > 48 * 1024 && cuda_host_limit < cuda_host_most_bytes - 2048))
        std::exit(9);
    for (uint32_t ticket : tickets)
        if (ticket != 0) std::exit(7);
    if (n_frames == 0) return;
    std::fwrite(verdicts.data(), sizeof(ife_cuda_verdict), verdicts.size(), stdout);
    std::fwrite(scores.data(), sizeof(float), scores.size(), stdout);
    heap.clear();
}

/* A case that every contract refuses: the launch must say so and touch nothing. */
static void check_refusals() {
    float x = 0.0f;
    ife_cuda_verdict verdict = {};
    uint32_t ticket = 0;
    const ife_cuda_guard judge = {};
    const ife_cuda_out out = {&verdict, &x};
    const ife_cuda_params valid = {1, 1, 1, 1, 1, 1, 2, &judge, &ticket};
    std::vector<ife_cuda_params> wrong(9, valid);
    wrong[0].n_guards = 0;
    wrong[1].guards = nullptr;
    wrong[2].tickets = nullptr;
    wrong[3].n_features = IFE_MAX_FEATURES + 1;
    wrong[4].n_groups = 0;
    wrong[5].max_frames = 0;
    wrong[6].max_rows = 0;
    wrong[7].n_classes = 0;
    wrong[8].n_vectors = 1;
    for (const ife_cuda_params &params : wrong)
        if (ife_cuda_launch(&params, &x, &x, &out, 1, nullptr) != 1) std::exit(8);
    if (ife_cuda_launch(&valid, nullptr, &x, &out, 1, nullptr) != 1) std::exit(8);
    if (ife_cuda_launch(&valid, &x, &x, nullptr, 1, nullptr) != 1) std::exit(8);
    if (ife_cuda_launch(&valid, &x, &x, &out, -1, nullptr) != 1) std::exit(8);
    if (ife_cuda_launch(&valid, &x, &x, &out, 0, nullptr) != 0) std::exit(8);
}

int main() {
    check_refusals();
    int32_t head[6]; /* guards, D, C, frames, has logits, groups */
    while (std::fread(head, sizeof head, 1, stdin) == 1) run_case(head);
    return 0;
}
