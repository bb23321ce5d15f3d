// TMA: copies between global memory and boxes of shared memory, and the proxy that they, and wgmma, see it through.
#include <algorithm>
#include <cstring>
#ifdef EMU_ASAN
#include <sanitizer/asan_interface.h>
#endif

#include "block.h"
#include "memory_map.h"

namespace emu {

uint32_t shared_address(const void* pointer) {
  if (pointer == nullptr) return 0;  // which CUTLASS converts in places where it does not use it
  if (!this_block().in_shared(pointer, 1)) fail("%p is not in shared memory", pointer);
  return static_cast<uint32_t>(static_cast<const unsigned char*>(pointer) - this_block().shared());
}

unsigned char* shared_pointer(uint32_t address, size_t bytes) {
  if (address + bytes > this_block().shared_bytes()) fail("%u is not in shared memory", address);
  return this_block().shared() + address;
}

unsigned char* async_view() {
  auto& view = this_block().sm90.async_view;
  if (!view) {
    view.reset(new unsigned char[this_block().shared_bytes()]);
    poison(view.get(), this_block().shared_bytes());
  }
  return view.get();
}

// More than a GPU promises: the writes of all threads become visible, not those alone that are ordered before the
// fence.
void fence_proxy_async() {
  const Unseen unseen;  // of bytes that others write at the same time
  std::memcpy(async_view(), this_block().shared(), this_block().shared_bytes());
  fence_mbarrier_init();
}

void check_proxy(uint32_t address, uint32_t bytes, const char* reader) {
  if (std::memcmp(shared_pointer(address, bytes), async_view() + address, bytes) != 0)
    fail("%s reads shared memory that was written without a fence.proxy.async since", reader);
}

namespace {

constexpr uint32_t kPiece = 16;  // bytes that stay together in every swizzle

// Calls visit(address in shared memory, row, begin in the row) for each piece of a box.
template <class Visit>
void pieces(const BulkCopy& copy, const Visit& visit) {
  uint32_t address = copy.shared;
  for (const Row& row : copy.rows)
    for (uint32_t begin = 0; begin < copy.row_bytes; begin += kPiece, address += kPiece)
      visit(swizzled(address, copy.swizzle_bits), row, begin);
}

// Calls move(offset in the piece, address in global memory, bytes) for the part of a piece that exists.
template <class Move>
void existing(const Row& row, uint32_t begin, const Move& move) {
  const uint32_t first = std::max(begin, row.first), last = std::min(begin + kPiece, row.last);
  if (first >= last) return;
#ifdef EMU_ASAN
  if (__asan_region_is_poisoned(row.memory + first, last - first))
    fail("TMA: %p is outside of the tensor's memory", static_cast<void*>(row.memory + first));
#endif
  move(first - begin, row.memory + first, last - first);
}

// To TF32: with odd seeds to nearest even, with others not at all, which leaves it to wgmma to cut bits off. NVIDIA
// says of neither that it is what TMA does.
void round_to_tf32(unsigned char* piece) {
  if (this_block().seed() % 2 == 0) return;
  for (uint32_t i = 0; i < kPiece; i += 4) {
    uint32_t bits;
    std::memcpy(&bits, piece + i, 4);
    const bool finite = (bits & 0x7f800000u) != 0x7f800000u;
    if (finite) bits = (bits + 0xfffu + (bits >> 13 & 1)) & 0xffffe000u;
    std::memcpy(piece + i, &bits, 4);
  }
}

void write(uint32_t address, const unsigned char* piece) {
  std::memcpy(this_block().shared() + address, piece, kPiece);
  std::memcpy(async_view() + address, piece, kPiece);
}

BulkCopy bulk_copy(const TensorMap& map, std::vector<Row> rows, uint32_t shared, uint32_t barrier_or_group) {
  shared_pointer(shared, map.box_bytes());
  if (shared % 128) fail("TMA: %u is not aligned to 128 bytes", shared);
  return {std::move(rows), map.row_bytes(), map.swizzle_bits, shared, barrier_or_group, map.tf32};
}

void perform_store(const BulkCopy& store) {
  pieces(store, [](uint32_t address, const Row& row, uint32_t begin) {
    existing(row, begin, [=](uint32_t offset, unsigned char* memory, uint32_t bytes) {
      std::memcpy(memory, this_block().shared() + address + offset, bytes);
    });
  });
}

}  // namespace

void prefetch_tensor_map(uint64_t map) { tensor_map(map); }

void tma_load(uint64_t address, std::initializer_list<int> at, std::initializer_list<int> offsets, uint32_t target,
              uint32_t barrier) {
  const TensorMap& map = tensor_map(address);
  if (at.size() != map.rank || map.im2col != (offsets.size() > 0)) fail("TMA: the load does not fit the tensor map");
  const auto found = this_block().sm90.mbarriers.find(barrier);
  if (found == this_block().sm90.mbarriers.end() || !found->second.fenced)
    fail("TMA: the mbarrier was not initialised, or there was no fence since");
  auto rows = map.im2col ? im2col_rows(map, at.begin(), offsets.begin()) : tiled_rows(map, at.begin());
  BulkCopy load = bulk_copy(map, std::move(rows), target, barrier);
  unsigned char nan[kPiece];
  std::memset(nan, 0xFF, kPiece);
  pieces(load, [&](uint32_t piece, const Row&, uint32_t) { write(piece, nan); });
  this_block().sm90.loads.push_back(std::move(load));
}

bool deliver_load() {
  auto& loads = this_block().sm90.loads;
  if (loads.empty()) return false;
  const auto drawn = loads.begin() + this_block().draw(static_cast<unsigned>(loads.size()));
  const BulkCopy load = std::move(*drawn);
  loads.erase(drawn);
  pieces(load, [&](uint32_t address, const Row& row, uint32_t begin) {
    unsigned char piece[kPiece] = {};
    existing(row, begin, [&](uint32_t offset, const unsigned char* memory, uint32_t bytes) {
      std::memcpy(piece + offset, memory, bytes);
    });
    if (load.tf32) round_to_tf32(piece);
    write(address, piece);
  });
  mbarrier_complete(load.barrier_or_group, static_cast<uint32_t>(load.rows.size()) * load.row_bytes);
  return true;
}

void tma_store(uint64_t address, std::initializer_list<int> at, uint32_t source) {
  const TensorMap& map = tensor_map(address);
  if (at.size() != map.rank || map.im2col) fail("TMA: the store does not fit the tensor map");
  ThreadState& thread = this_thread().sm90;
  BulkCopy store = bulk_copy(map, tiled_rows(map, at.begin()), source, thread.store_groups);
  check_proxy(source, map.box_bytes(), "TMA");
  if (this_block().drawn(2))
    perform_store(store);
  else
    thread.stores.push_back(std::move(store));
}

void tma_store_commit() { this_thread().sm90.store_groups += 1; }

void tma_store_wait(uint32_t pending_groups) {
  ThreadState& thread = this_thread().sm90;
  while (!thread.stores.empty() && thread.stores.front().barrier_or_group + pending_groups < thread.store_groups) {
    perform_store(thread.stores.front());
    thread.stores.erase(thread.stores.begin());
  }
}

void end_thread(bool last) {
  if (!this_thread().sm90.stores.empty()) fail("TMA: the thread ends before its stores have read shared memory");
  if (!this_thread().warp->sm90.products.empty()) fail("wgmma: the thread ends before it has waited");
  if (!last) return;
  if (!this_block().sm90.loads.empty()) fail("TMA: the block ends before its loads have arrived");
  for (const auto& [address, barrier] : this_block().sm90.mbarriers)
    if (barrier.bytes != 0) fail("mbarrier: the block ends, and %d bytes are missing", static_cast<int>(barrier.bytes));
}

}  // namespace emu
