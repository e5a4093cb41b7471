# Whether the CUDA library is built, why, and for which GPUs.
#
#   PLORA_CUDA=OFF, FORCE_CUDA=0 or PLORA_FORCE_CPU=1   no
#   nvcc 12.0 or newer found                            yes (CUDA_HOME, then PATH, then /usr/local/cuda)
#   PLORA_CUDA=ON or FORCE_CUDA=1 without it            an error
set(forced OFF)
set(refusal "")
if(PLORA_CUDA STREQUAL "ON")
  set(forced "PLORA_CUDA=ON")
elseif(PLORA_CUDA STREQUAL "OFF")
  set(refusal "PLORA_CUDA=OFF")
elseif("$ENV{PLORA_FORCE_CPU}" STREQUAL "1")
  set(refusal "PLORA_FORCE_CPU=1")
elseif("$ENV{FORCE_CUDA}" STREQUAL "0")
  set(refusal "FORCE_CUDA=0")
elseif("$ENV{FORCE_CUDA}" STREQUAL "1")
  set(forced "FORCE_CUDA=1")
endif()

if(NOT refusal)
  unset(nvcc CACHE) # looked for anew each time: an incremental build follows the environment
  find_program(nvcc nvcc HINTS "$ENV{CUDA_HOME}/bin" "$ENV{CUDA_PATH}/bin" PATHS /usr/local/cuda/bin
               NO_CMAKE_FIND_ROOT_PATH NO_CMAKE_SYSTEM_PATH NO_CMAKE_PATH)
  if(NOT nvcc)
    set(refusal "nvcc was not found in CUDA_HOME, PATH or /usr/local/cuda")
  else()
    execute_process(COMMAND ${nvcc} --version OUTPUT_VARIABLE nvcc_text ERROR_QUIET)
    string(REGEX MATCH "release ([0-9]+\\.[0-9]+)" _ "${nvcc_text}")
    set(nvcc_release "${CMAKE_MATCH_1}")
    if(NOT nvcc_release OR nvcc_release VERSION_LESS 12.0)
      set(refusal "${nvcc} is release '${nvcc_release}', and CUDA 12.0 or newer is needed")
    endif()
  endif()
endif()

# GPUs: TORCH_CUDA_ARCH_LIST in torch's notation, else Ampere (with PTX, which newer GPUs compile for themselves) and
# Hopper. A list made for other software (NGC's images set one) may name older GPUs, which are left out, and Hopper as
# 9.0, while its own instructions only compile for 9.0a.
set(PLORA_GENCODE "")
set(PLORA_CUDA_ARCHS "")
set(changes "")
if(NOT refusal)
  set(archs "$ENV{TORCH_CUDA_ARCH_LIST}")
  if(NOT archs)
    set(archs "8.0+PTX;9.0a")
  endif()
  string(REGEX REPLACE "[ ,;]+" ";" archs "${archs}")
  foreach(arch IN LISTS archs)
    if(NOT arch MATCHES "^([0-9]+)\\.([0-9])([af]?)(\\+PTX)?$")
      message(FATAL_ERROR "TORCH_CUDA_ARCH_LIST must list GPU architectures such as '8.0;9.0a+PTX', got '${arch}'")
    endif()
    set(number "${CMAKE_MATCH_1}${CMAKE_MATCH_2}")
    set(virtual "${number}${CMAKE_MATCH_3}")
    set(ptx "${CMAKE_MATCH_4}")
    if(number LESS 80)
      string(APPEND changes "; ${arch} of TORCH_CUDA_ARCH_LIST is left out, as 8.0 or newer is needed")
      continue()
    endif()
    set(native "${virtual}")
    if(native STREQUAL "90")
      set(native "90a")
      string(APPEND changes "; ${arch} of TORCH_CUDA_ARCH_LIST is taken for 9.0a")
    endif()
    list(APPEND PLORA_GENCODE "-gencode=arch=compute_${native},code=sm_${native}")
    list(APPEND PLORA_CUDA_ARCHS "sm_${native}")
    if(ptx)
      list(APPEND PLORA_GENCODE "-gencode=arch=compute_${virtual},code=compute_${virtual}")
      list(APPEND PLORA_CUDA_ARCHS "compute_${virtual}")
    endif()
  endforeach()
  list(REMOVE_DUPLICATES PLORA_GENCODE)
  list(REMOVE_DUPLICATES PLORA_CUDA_ARCHS)
  string(REPLACE ";" " " PLORA_CUDA_ARCHS_TEXT "${PLORA_CUDA_ARCHS}")
  if(NOT PLORA_CUDA_ARCHS)
    set(refusal "TORCH_CUDA_ARCH_LIST='$ENV{TORCH_CUDA_ARCH_LIST}' names no GPU of compute capability 8.0 or newer")
  endif()
endif()

if(refusal AND forced)
  message(FATAL_ERROR "${forced} asks for the CUDA library, but ${refusal}. "
                      "Install the CUDA toolkit or set CUDA_HOME to it, or set PLORA_FORCE_CPU=1 to build without CUDA.")
elseif(refusal)
  set(PLORA_WITH_CUDA OFF)
  set(PLORA_CUDA_REASON "no CUDA because ${refusal}")
  return()
endif()

set(PLORA_WITH_CUDA ON)
set(PLORA_CUDA_REASON "CUDA because nvcc was found at ${nvcc}${changes}")
if(forced)
  set(PLORA_CUDA_REASON "CUDA because ${forced}${changes}")
endif()

# CMake keeps the compiler of a folder's first configuration: it would build with that one and name the other.
if(DEFINED PLORA_NVCC AND NOT PLORA_NVCC STREQUAL "${nvcc} ${nvcc_release}")
  message(FATAL_ERROR "This build folder was made with another nvcc: ${PLORA_NVCC} then, ${nvcc} ${nvcc_release} now. "
                      "Remove ${CMAKE_BINARY_DIR}, or set CUDA_HOME to the toolkit of before.")
endif()
set(PLORA_NVCC "${nvcc} ${nvcc_release}" CACHE INTERNAL "The nvcc that this folder was made with")

# A driver serves the CUDA of its own major version and older ones, and torch shows which drivers are about.
string(REGEX MATCH "^[0-9]+" nvcc_major "${nvcc_release}")
string(REGEX MATCH "^[0-9]+" torch_major "${PLORA_TORCH_CUDA}")
if(torch_major AND nvcc_major GREATER torch_major)
  message(WARNING "nvcc is of CUDA ${nvcc_release}, torch of CUDA ${PLORA_TORCH_CUDA}. A driver of CUDA ${torch_major} "
                  "cannot run what is built now: set CUDA_HOME to a toolkit of CUDA ${torch_major}, unless the driver "
                  "is newer than torch.")
endif()

set(CMAKE_CUDA_COMPILER "${nvcc}")
set(CMAKE_CUDA_ARCHITECTURES OFF) # given as -gencode above
set(CMAKE_CUDA_RUNTIME_LIBRARY Static)
set(CMAKE_CUDA_STANDARD 17)
set(CMAKE_CUDA_STANDARD_REQUIRED ON)
set(CMAKE_CUDA_FLAGS_RELEASE "-O3 -DNDEBUG")
enable_language(CUDA)
