// A program for a GPU: ldmatrix and mma.sync, through the wrappers of csrc/cuda/mma.cuh and with the addresses of
// csrc/cuda/conv_tile.cuh, against products of small integers, which are exact. The emulator takes their layouts for
// granted; here the hardware says whether they are so. Returns how many types are wrong.
#include <cstdio>
#include <cstdlib>

#include "cuda/mma.cuh"

using namespace resfuse::cuda;

namespace {

constexpr int kM = 16, kN = 16;

// d[16][16] = a[16][k] b[16][k]^T by one warp; rows are 32 bytes.
template <class Math, class T, int K>
__global__ void product(const T* a, const T* b, float* d) {
  __shared__ __align__(16) T rows[kM][K], columns[kN][K];
  const int lane = threadIdx.x;
  for (int i = lane; i < kM * K; i += 32) rows[i / K][i % K] = a[i], columns[i / K][i % K] = b[i];
  __syncwarp();
  uint32_t x[4], y[4];
  load_matrices(x, &rows[lane % 16][lane / 16 * (K / 2)]);
  load_matrices(y, &columns[lane / 16 * 8 + lane % 8][lane / 8 % 2 * (K / 2)]);
  for (int i = 0; i < 4; ++i) x[i] = Math::prepare(x[i]), y[i] = Math::prepare(y[i]);
  for (int j = 0; j < 2; ++j) {
    float sums[4] = {};
    const uint32_t half[2] = {y[2 * j], y[2 * j + 1]};
    Math::multiply(sums, x, half);
    for (int q = 0; q < 4; ++q) d[(lane / 4 + q / 2 * 8) * kN + j * 8 + lane % 4 * 2 + q % 2] = sums[q];
  }
}

void check(cudaError_t status) {
  if (status == cudaSuccess) return;
  std::printf("%s\n", cudaGetErrorString(status));
  std::exit(100);
}

template <class Math, class T>
int wrong(const char* name, T (*convert)(float)) {
  constexpr int K = 32 / sizeof(T);
  static T a[kM * K], b[kN * K];
  static float d[kM * kN];
  for (T& value : a) value = convert(static_cast<float>(std::rand() % 9 - 4));
  for (T& value : b) value = convert(static_cast<float>(std::rand() % 9 - 4));
  T *device_a, *device_b;
  float* device_d;
  check(cudaMalloc(&device_a, sizeof a));
  check(cudaMalloc(&device_b, sizeof b));
  check(cudaMalloc(&device_d, sizeof d));
  check(cudaMemcpy(device_a, a, sizeof a, cudaMemcpyHostToDevice));
  check(cudaMemcpy(device_b, b, sizeof b, cudaMemcpyHostToDevice));
  product<Math, T, K><<<1, 32>>>(device_a, device_b, device_d);
  check(cudaGetLastError());
  check(cudaMemcpy(d, device_d, sizeof d, cudaMemcpyDeviceToHost));
  int count = 0;
  for (int m = 0; m < kM; ++m)
    for (int n = 0; n < kN; ++n) {
      float expected = 0;
      for (int k = 0; k < K; ++k) expected += static_cast<float>(a[m * K + k]) * static_cast<float>(b[n * K + k]);
      count += d[m * kN + n] != expected;
    }
  std::printf("%s: %d of %d wrong\n", name, count, kM * kN);
  return count != 0;
}

}  // namespace

int main() {
  return wrong<Bf16, __nv_bfloat16>("bf16", [](float x) { return __float2bfloat16(x); }) +
         wrong<Fp16, __half>("fp16", [](float x) { return __float2half(x); }) +
         wrong<Tf32, float>("tf32", [](float x) { return x; });
}
