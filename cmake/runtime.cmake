# One C++ runtime in the process: the shared libstdc++ that torch uses. A toolchain may link its own statically
# (-static-libstdc++), and half of that would be taken for torch's at load: streams and exceptions break. So
# libstdc++.so.6 is named before whatever the compiler adds, unless this machine's is older than the compiler's. And what
# is static all the same stays inside: a library exports nothing (its operators register themselves when it is loaded)
# but the names of cmake/exports.map.
include(CheckCXXSourceRuns)
set(CMAKE_REQUIRED_LIBRARIES -l:libstdc++.so.6)
check_cxx_source_runs("
  #include <iostream>
  #ifndef __GLIBCXX__
  #error another C++ library
  #endif
  int main() { std::cout << 1; }" PLORA_SHARED_LIBSTDCXX)
unset(CMAKE_REQUIRED_LIBRARIES)

add_library(plora_runtime INTERFACE)
if(PLORA_SHARED_LIBSTDCXX)
  target_link_libraries(plora_runtime INTERFACE -l:libstdc++.so.6)
endif()
target_link_options(plora_runtime INTERFACE "LINKER:--version-script=${CMAKE_CURRENT_SOURCE_DIR}/cmake/exports.map")
set_property(TARGET plora_runtime PROPERTY INTERFACE_LINK_DEPENDS ${CMAKE_CURRENT_SOURCE_DIR}/cmake/exports.map)
