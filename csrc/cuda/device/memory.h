// Memory that a launcher asks for.
#pragma once

#include <cstddef>
#include <functional>

namespace plora::cuda {

// So many bytes of the device for the kernels that a launcher enqueues, not written to yet and aligned to 16 bytes at
// least. They are its caller's: who returns them to the stream's own allocator may do so once the kernels are enqueued.
using Allocator = std::function<void*(size_t bytes)>;

}  // namespace plora::cuda
