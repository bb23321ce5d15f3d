// wgmma: the part of a product that a warp of the warpgroup has, 16 rows of 64.
#include <algorithm>
#include <cstring>

#include "block.h"

namespace emu {
namespace {

constexpr int kRows = 16, kRowBytes = 32;  // of k, in every type

struct Issue {
  const Wgmma* operation;
  float* const* registers;
};

// Rows of an operand that is K-major in shared memory, in groups of 8: 32 bytes from each.
void read_operand(MmaType type, uint64_t descriptor, int first, int rows, float (*out)[256]) {
  const auto layout = static_cast<int>(descriptor >> 62);  // 1, 2, 3: swizzle of 128, 64, 32 bytes
  if (layout == 0 || descriptor >> 49 & 7) fail("wgmma: a layout of operands that is not emulated");
  const int swizzle_bits = 4 - layout, per_register = type == MmaType::tf32 ? 1 : 2;
  const auto start = static_cast<uint32_t>(descriptor & 0x3fff) << 4;
  const auto group_stride = static_cast<uint32_t>(descriptor >> 32 & 0x3fff) << 4;
  for (int row = first; row < first + rows; ++row)
    for (int begin = 0; begin < kRowBytes; begin += 16) {
      const uint32_t address =
          swizzled(start + row / 8 * group_stride + row % 8 * (16 << swizzle_bits) + begin, swizzle_bits);
      check_proxy(address, 16, "wgmma");
      uint32_t registers[4];
      std::memcpy(registers, shared_pointer(address, 16), 16);
      for (int i = 0; i < 4 * per_register; ++i)
        out[begin / 4 * per_register + i][row - first] = element(type, registers[i / per_register], i % per_register);
    }
}

// Where lane and register have their element: the layout of accumulators in the PTX manual.
float& value_of(Accumulators& tile, int lane, int i) {
  return tile.values[lane / 4 + i / 2 % 2 * 8][i / 4 * 8 + lane % 4 * 2 + i % 2];
}

// Products are exact, sums are fp32 in order of k, as those of mma.
void perform(WarpState::Product& product) {
  const Wgmma& operation = product.operation;
  static float a[16][256], b[16][256];
  Accumulators& to = *product.to;
  const int warp = static_cast<int>(this_thread().number / 32 % 4);
  read_operand(operation.type, operation.a, warp * kRows, kRows, a);
  read_operand(operation.type, operation.b, 0, to.columns, b);
  for (int m = 0; m < kRows; ++m) {
    float* sums = to.values[m];
    if (!operation.accumulate) std::fill_n(sums, to.columns, 0.0f);
    for (int k = 0; k < (operation.type == MmaType::tf32 ? 8 : 16); ++k)
      for (int n = 0; n < to.columns; ++n) sums[n] += a[k][m] * b[k][n];
  }
  product.done = true;
}

WarpState& warp_state() { return this_thread().warp->sm90; }

void issue(void* const* operands, unsigned lanes) {
  const Unseen unseen;  // of the registers of all lanes
  need_the_whole_warp(lanes, "wgmma");
  const auto& first = *static_cast<const Issue*>(operands[0]);
  const Wgmma& operation = *first.operation;
  WarpState& warp = warp_state();
  auto& tile = warp.accumulators[first.registers[0]];
  if (!tile) {
    if (!warp.registers_fenced) fail("wgmma: no wgmma.fence since accumulators were accessed");
    tile = std::make_unique<Accumulators>();
    tile->columns = operation.registers * 2;
    for (int lane = 0; lane < 32; ++lane) {
      const auto& own = *static_cast<const Issue*>(operands[lane]);
      tile->registers[lane] = own.registers[0];
      for (int i = 0; i < operation.registers; ++i) {
        if (own.registers[i] != own.registers[0] + i) fail("wgmma: accumulators that are not one array");
        value_of(*tile, lane, i) = *own.registers[i];
      }
      std::memset(own.registers[0], 0xFF, sizeof(float) * operation.registers);
    }
  }
  for (int lane = 0; lane < 32; ++lane) {
    const Wgmma& own = *static_cast<const Issue*>(operands[lane])->operation;
    if (own.a != operation.a || own.b != operation.b) fail("wgmma: descriptors that differ in a warp");
  }
  warp.products.push_back({operation, tile.get(), warp.product_groups, false});
  if (!this_block().drawn(2)) return;
  const auto next =
      std::find_if(warp.products.begin(), warp.products.end(), [](auto& product) { return !product.done; });
  perform(*next);
}

// All lanes of the warp at once, in a collective: what perform() and the threads' registers need.
void fence(void* const*, unsigned lanes) {
  need_the_whole_warp(lanes, "wgmma.fence");
  warp_state().registers_fenced = true;
}

void commit(void* const*, unsigned lanes) {
  need_the_whole_warp(lanes, "wgmma.commit_group");
  warp_state().product_groups += 1;
}

void wait(void* const* operands, unsigned lanes) {
  const Unseen unseen;
  need_the_whole_warp(lanes, "wgmma.wait_group");
  WarpState& warp = warp_state();
  auto& products = warp.products;
  const unsigned pending_groups = *static_cast<const uint32_t*>(operands[0]);
  while (!products.empty() && products.front().group + pending_groups < warp.product_groups) {
    if (!products.front().done) perform(products.front());
    products.erase(products.begin());
  }
  for (auto at = warp.accumulators.begin(); at != warp.accumulators.end();) {
    Accumulators& tile = *at->second;
    const auto is_its_own = [&](const auto& product) { return product.to == &tile; };
    if (std::any_of(products.begin(), products.end(), is_its_own)) {
      ++at;
      continue;
    }
    for (int lane = 0; lane < 32; ++lane)
      for (int i = 0; i < tile.columns / 2; ++i) tile.registers[lane][i] = value_of(tile, lane, i);
    at = warp.accumulators.erase(at);
    warp.registers_fenced = false;
  }
}

}  // namespace

void wgmma(const Wgmma& operation, float* const* registers) {
  if (operation.negated || operation.transposed) fail("wgmma: negated and transposed operands are not emulated");
  Issue own{&operation, registers};
  collective(~0u, issue, &own);
}

void wgmma_fence() { collective(~0u, fence, nullptr); }
void wgmma_commit() { collective(~0u, commit, nullptr); }
void wgmma_wait(uint32_t pending_groups) { collective(~0u, wait, &pending_groups); }

}  // namespace emu
