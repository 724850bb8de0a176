#include "inflight.h"

#include <math.h>
#include <stddef.h>

int32_t ife_predict(const float *logits, int32_t n_classes) {
    if (!logits) return -1;
    int32_t best = n_classes > 0 ? 0 : -1;
    for (int32_t c = 0; c < n_classes; ++c) {
        if (!isfinite(logits[c])) return -1;
        if (logits[c] > logits[best]) best = c;
    }
    return best;
}
