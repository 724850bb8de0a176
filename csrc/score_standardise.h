/* ife_standardise_pair for vectors with a fused multiply-add; the same operations in the same order. */
static inline vec vec_standardise(vec x, vec mean, vec scale, vec inverse, vec *low) {
    const vec difference = vec_sub(x, mean);
    const vec back = vec_sub(difference, x);
    const vec error = vec_sub(vec_sub(x, vec_sub(difference, back)), vec_add(mean, back));
    const vec high = vec_mul(difference, inverse);
    *low = vec_mul(vec_add(vec_fnma(high, scale, difference), error), inverse);
    return high;
}
