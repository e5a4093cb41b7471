// The protocol by which the warps of a block of cuda/fused_sm90.cu hand tiles on, searched state by state: no
// description of a tile may be written over while a warpgroup still adds that tile's bias.
//
// One warp describes tiles, a tile ahead of the warp that starts and feeds them into a ring of stages; two warpgroups
// take turns at multiplying and writing. Fewest stages a tile, one, is the worst case.
#include "../cuda/lora/tile_ring.h"

#include <cstdio>
#include <queue>
#include <set>
#include <tuple>

namespace {

enum Phase { kWaiting, kReleased, kPassed, kPhases };  // kPassed: writing y, with the bias of the description

struct State {
  int described = 0, started = 0, fed = 0, passed = 0;
  int tile[2] = {0, 1}, phase[2] = {kWaiting, kWaiting};
  auto key() const { return std::tuple(described, started, fed, passed, tile[0], tile[1], phase[0], phase[1]); }
};

// Tiles up to this one have left their stage.
bool released(const State& s, int n) {
  const int g = n % 2;
  return n < s.tile[g] || (n == s.tile[g] && s.phase[g] >= kReleased);
}

// Whether a state can be reached in which a description is being written that is still read.
bool overtakes(int tiles, int stages) {
  const int last = 3 * (tiles + stages);
  std::set<decltype(State{}.key())> seen;
  std::queue<State> open;
  const auto reach = [&](const State& s) {
    if (seen.insert(s.key()).second) open.push(s);
  };
  reach(State{});
  while (!open.empty()) {
    const State s = open.front();
    open.pop();
    if (s.described < last && (s.described == 0 || s.started >= s.described)) {  // describe the next one
      const int before = s.described - tiles;
      if (before >= 0 && before >= s.tile[before % 2]) return true;
      State next = s;
      ++next.described;
      reach(next);
    }
    if (s.started == s.fed && s.started < s.described) {
      State next = s;
      ++next.started;
      reach(next);
    }
    if (s.fed < s.started && (s.fed < stages || released(s, s.fed - stages))) {
      State next = s;
      ++next.fed;
      reach(next);
    }
    for (int g = 0; g < 2; ++g) {
      const int n = s.tile[g];
      State next = s;
      if (s.phase[g] == kWaiting && s.described > n && s.passed >= n && s.fed > n) {
        next.phase[g] = kReleased;
      } else if (s.phase[g] == kReleased) {
        next.phase[g] = kPassed;
        next.passed = n + 1;
      } else if (s.phase[g] == kPassed) {  // written
        next.phase[g] = kWaiting;
        next.tile[g] = n + 2;
      } else {
        continue;
      }
      reach(next);
    }
  }
  return false;
}

}  // namespace

int main() {
  using namespace plora::tile_ring;
  int failures = 0;
  const auto expect = [&](bool holds, const char* what) {
    if (!holds) std::printf("FAILED: %s\n", what), ++failures;
  };
  expect(overtakes(8, 5), "a ring of 8 under 5 stages is too short, and the search finds it");
  expect(!overtakes(tiles_alive(5), 5) && !overtakes(tiles_alive(4), 4), "tiles_alive is enough");
  expect(!overtakes(kTiles, kStagesGiven) && !overtakes(kTiles, kStagesInLoop), "the kernels' rings are long enough");
  return failures;
}
