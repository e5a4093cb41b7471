# Torch's headers and libraries, from PLORA_TORCH_DIR. Torch's own CMake package is not used: with a CUDA build of torch it
# insists on a CUDA toolkit, which the CPU library does not need.
if(NOT EXISTS "${PLORA_TORCH_DIR}/include/torch/csrc/stable/library.h")
  message(FATAL_ERROR "PLORA_TORCH_DIR must be the folder of an installed torch 2.10 or newer (with include/ and lib/), "
                      "got '${PLORA_TORCH_DIR}'. To find it: python -c \"import torch; print(torch.__path__[0])\"")
endif()

file(STRINGS "${PLORA_TORCH_DIR}/include/torch/headeronly/version.h" version_lines REGEX "define TORCH_VERSION_M")
string(REGEX REPLACE ".*MAJOR ([0-9]+).*MINOR ([0-9]+).*" "\\1.\\2" PLORA_TORCH_VERSION "${version_lines}")
if(PLORA_TORCH_VERSION VERSION_LESS 2.10)
  message(FATAL_ERROR "plora_ext needs torch 2.10 or newer, got ${PLORA_TORCH_VERSION} in '${PLORA_TORCH_DIR}'")
endif()

# The full version and torch's CUDA, where torch is the Python package: for the build facts only.
set(PLORA_TORCH_CUDA "")
if(EXISTS "${PLORA_TORCH_DIR}/version.py")
  file(STRINGS "${PLORA_TORCH_DIR}/version.py" version_lines REGEX "^(__version__|cuda)[ :]")
  foreach(line IN LISTS version_lines)
    if(line MATCHES "^__version__.*'(.+)'")
      set(PLORA_TORCH_VERSION "${CMAKE_MATCH_1}")
    elseif(line MATCHES "^cuda.*'(.+)'")
      set(PLORA_TORCH_CUDA "${CMAKE_MATCH_1}")
    endif()
  endforeach()
endif()

foreach(name torch_cpu c10 torch_cuda)
  if(EXISTS "${PLORA_TORCH_DIR}/lib/lib${name}.so")
    add_library(${name} SHARED IMPORTED)
    set_target_properties(${name} PROPERTIES IMPORTED_LOCATION "${PLORA_TORCH_DIR}/lib/lib${name}.so"
                                             IMPORTED_NO_SONAME FALSE)
  elseif(name STREQUAL torch_cuda)
    # A torch without CUDA has no libtorch_cuda. The CUDA library still must name it as NEEDED, so it is linked against a
    # stub of that soname, which defines the functions of torch's stable CUDA interface and is never shipped or loaded.
    set(functions
        aoti_torch_create_cuda_guard aoti_torch_delete_cuda_guard aoti_torch_cuda_guard_set_index
        aoti_torch_create_cuda_stream_guard aoti_torch_delete_cuda_stream_guard aoti_torch_get_current_cuda_stream
        aoti_torch_cuda_caching_allocator_raw_alloc aoti_torch_cuda_caching_allocator_raw_delete
        torch_get_current_cuda_blas_handle torch_set_current_cuda_stream torch_get_cuda_stream_from_pool
        torch_cuda_stream_synchronize torch_c10_cuda_check_msg torch_c10_cuda_free_error_msg)
    set(stub "")
    foreach(function IN LISTS functions)
      string(APPEND stub "extern \"C\" __attribute__((visibility(\"default\"))) void ${function}() {}\n")
    endforeach()
    file(CONFIGURE OUTPUT stub/torch_cuda.cpp CONTENT "${stub}")
    add_library(torch_cuda SHARED EXCLUDE_FROM_ALL ${CMAKE_CURRENT_BINARY_DIR}/stub/torch_cuda.cpp)
    set_target_properties(torch_cuda PROPERTIES LIBRARY_OUTPUT_DIRECTORY ${CMAKE_CURRENT_BINARY_DIR}/stub)
  else()
    message(FATAL_ERROR "PLORA_TORCH_DIR='${PLORA_TORCH_DIR}' has no lib/lib${name}.so")
  endif()
endforeach()
