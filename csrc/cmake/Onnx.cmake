# libcospadi_onnx: operator CospadiLinear for ONNX Runtime. It links neither that nor libcospadi, so that one file
# is all that a server needs; of the core it takes what the operator calls, without CUDA.
function(cospadi_add_onnx)
  add_library(cospadi_archive STATIC EXCLUDE_FROM_ALL $<TARGET_OBJECTS:cospadi_objs>)
  add_library(cospadi_onnx SHARED
    csrc/onnx/linear_kernel.cpp
    csrc/onnx/ort_abi.cpp
    csrc/onnx/register.cpp
    csrc/cuda/unavailable.cpp) # before the archive, which else brings the CUDA kernels in
  target_include_directories(cospadi_onnx PRIVATE csrc csrc/include)
  target_link_libraries(cospadi_onnx PRIVATE cospadi_archive OpenMP::OpenMP_CXX)
  # of the archive's CUDA objects none is taken
  set_target_properties(cospadi_onnx PROPERTIES LINKER_LANGUAGE CXX)
  cospadi_warnings(cospadi_onnx)
  cospadi_limit_symbols(cospadi_onnx "${PROJECT_SOURCE_DIR}/csrc/cmake/onnx.map")
  if(CMAKE_SYSTEM_NAME STREQUAL "Linux")
    # ONNX Runtime closes the library with its last session; OpenMP's threads, which would go on without
    # their code, outlive that.
    target_link_options(cospadi_onnx PRIVATE LINKER:-z,nodelete)
    if(NOT COSPADI_SANITIZE)
      target_link_options(cospadi_onnx PRIVATE LINKER:--no-undefined)
    endif()
  endif()
  install(TARGETS cospadi_onnx COMPONENT sdk
    RUNTIME DESTINATION "${COSPADI_INSTALL_LIB}"
    LIBRARY DESTINATION "${COSPADI_INSTALL_LIB}" COMPONENT sdk)
endfunction()
