// The sizes of the rings through which a block of fused_sm90.cu goes, apart so that a test can search their protocol
// for states in which one overtakes another (csrc/tests/tile_ring_test.cpp).
#pragma once

namespace plora::tile_ring {

// Stages of shared memory, of the kernel that makes h in its loop and of the one that is given h.
constexpr int kStagesInLoop = 4, kStagesGiven = 5;

// Descriptions of tiles. While one is written, that of as many tiles before must be done with: with a stage a tile, one
// tile is being described, one has been started, as many as there are stages are in them, one has left its stage to the
// other warpgroup's, and one is still on its way out, with its bias.
constexpr int tiles_alive(int stages) { return stages + 4; }
constexpr int kTiles = 10;
static_assert(kTiles >= tiles_alive(kStagesInLoop) && kTiles >= tiles_alive(kStagesGiven));

}  // namespace plora::tile_ring
