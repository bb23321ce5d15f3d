// Whether the tensors that a packed weight was made from still hold the same bytes: see snapshot in resfuse.h.
#include <cstring>

#include "../resfuse.h"

namespace resfuse::cpu {

namespace {

// f(pointer, bytes) for each piece of memory that belongs to the snapshot.
template <class F>
bool each_piece(const SnapshotSource& source, F f) {
  if (!f(source.shapes, sizeof source.shapes)) return false;
  for (const Bytes& vector : source.vectors)
    if (vector.data != nullptr && !f(vector.data, vector.size)) return false;
  const int64_t elements = source.weight.size / source.element_size;
  const int64_t samples = elements < kSnapshotSamples ? elements : kSnapshotSamples;
  for (int64_t i = 0; i < samples; ++i) {
    const int64_t element = samples > 1 ? i * (elements - 1) / (samples - 1) : 0;
    if (!f(static_cast<const uint8_t*>(source.weight.data) + element * source.element_size, source.element_size))
      return false;
  }
  return true;
}

}  // namespace

int64_t snapshot_size(const SnapshotSource& source) {
  int64_t size = 0;
  each_piece(source, [&](const void*, int64_t bytes) {
    size += bytes;
    return true;
  });
  return size;
}

void snapshot(const SnapshotSource& source, uint8_t* into) {
  each_piece(source, [&](const void* from, int64_t bytes) {
    std::memcpy(into, from, bytes);
    into += bytes;
    return true;
  });
}

bool snapshot_matches(const SnapshotSource& source, const uint8_t* taken, int64_t size) {
  return snapshot_size(source) == size && each_piece(source, [&](const void* from, int64_t bytes) {
           const bool same = std::memcmp(taken, from, bytes) == 0;
           taken += bytes;
           return same;
         });
}

}  // namespace resfuse::cpu
