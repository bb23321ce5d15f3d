// Shuffles and votes.
#pragma once
#include <cstring>
#include <type_traits>

#include "runtime.h"

namespace emu {

struct Shuffle {
  uint64_t value;
  unsigned source;
};
Perform exchange;

struct Vote {
  bool predicate;
  unsigned ballot;
};
Perform count_votes;

// The value of lane `source` where it is in this lane's segment of `width` lanes, else this lane's own.
template <class T>
T shuffle(unsigned mask, T value, int source, int width) {
  static_assert(sizeof(T) <= sizeof(uint64_t) && std::is_trivially_copyable_v<T>);
  if (width <= 0 || width > 32 || width & (width - 1)) fail("shuffle: a width of %d", width);
  const int own = static_cast<int>(lane()), first = own & ~(width - 1);
  const bool inside = source >= first && source < first + width;
  Shuffle shuffle{0, static_cast<unsigned>(inside ? source : own)};
  std::memcpy(&shuffle.value, &value, sizeof(T));
  collective(mask, exchange, &shuffle);
  std::memcpy(&value, &shuffle.value, sizeof(T));
  return value;
}

inline unsigned vote(unsigned mask, bool predicate) {
  Vote vote{predicate, 0};
  collective(mask, count_votes, &vote);
  return vote.ballot;
}

}  // namespace emu
