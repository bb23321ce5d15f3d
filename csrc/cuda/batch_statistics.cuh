// Shared by the kernels that compute batch statistics: batch norm and convolutions in training.
#pragma once
#include <cmath>
#include <cstdint>

namespace resfuse::cuda {

// A kernel whose blocks wait for each other runs as one cooperative launch, or as two: before and after the barrier.
enum class Phase : int32_t { both, first, second };

// (count, mean, M2) of a set of values, M2 = sum (x - mean)^2, merged by Chan's formula (Chan, Golub, LeVeque 1983,
// "Algorithms for computing the sample variance", (2.1)). M2 is a sum of thousands of positive terms, whose float
// roundings would add up to more than eager PyTorch's error: a second float carries them.
struct Moments {
  float count = 0.f, mean = 0.f, m2 = 0.f, m2_low = 0.f;

  __device__ __forceinline__ void merge(const Moments& other) {
    const float total = count + other.count;
    // Both may be empty.  A branch would keep the compiler from loading ahead across an unrolled loop of merges.
    const float share = other.count / fmaxf(total, 1.f), delta = other.mean - mean;
    mean = fmaf(delta, share, mean);
    add(other.m2);
    add(delta * (delta * (count * share)));
    m2_low += other.m2_low;
    count = total;
  }

  __device__ __forceinline__ double sum_of_squares() const { return static_cast<double>(m2) + m2_low; }

  // m2 += term, exactly: Knuth's two-sum.
  __device__ __forceinline__ void add(float term) {
    const float sum = m2 + term, added = sum - m2;
    m2_low += (m2 - (sum - added)) + (term - added);
    m2 = sum;
  }
};

// (variance + eps)^-1/2, rounded to nearest at every step.
__device__ __forceinline__ float inverse_deviation(float variance, float eps) { return 1.f / sqrtf(variance + eps); }
__device__ __forceinline__ double inverse_deviation(double variance, double eps) { return 1. / sqrt(variance + eps); }

// A running statistic after a batch; `old` times (1 - momentum) is exact where momentum is 0 or 1.
__device__ __forceinline__ float updated_running(double old, double now, double momentum) {
  return static_cast<float>(old * (1. - momentum) + now * momentum);
}

}  // namespace resfuse::cuda
