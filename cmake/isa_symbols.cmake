# Run by ctest. An inline function or template that csrc/cpu/isa shares with other files would be compiled for AVX-512 too,
# and the linker may keep that copy for everybody: a crash on older processors. So the objects compiled for an instruction
# set may define no weak symbol outside their own namespace.
#   cmake -DNM=nm -DISA=isa_avx2 -DOBJECTS=a.o,b.o -P isa_symbols.cmake
string(REPLACE "," ";" objects "${OBJECTS}")
foreach(object IN LISTS objects)
  execute_process(COMMAND ${NM} -C --defined-only ${object} OUTPUT_VARIABLE text COMMAND_ERROR_IS_FATAL ANY)
  string(REGEX MATCHALL "[^\n]* [WVu] [^\n]*" symbols "${text}")
  foreach(symbol IN LISTS symbols)
    if(NOT symbol MATCHES "${ISA}::")
      message(SEND_ERROR "${object}: weak symbol outside ${ISA}: ${symbol}")
    endif()
  endforeach()
endforeach()
