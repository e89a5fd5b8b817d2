# CUDA is optional: with a compiler the .cu files are built, without one the same symbols answer
# "built without CUDA". The runtime is linked statically, so one wheel
# imports on machines with and without a GPU. Included at top level: enable_language needs that scope.
set(COSPADI_HAS_CUDA OFF)
if(NOT COSPADI_CUDA STREQUAL "OFF")
  include(CheckLanguage)
  check_language(CUDA)
  if(CMAKE_CUDA_COMPILER)
    set(COSPADI_HAS_CUDA ON)
    # Compiling for every card takes minutes, so that is for wheels that travel (COSPADI_CUDA_ALL). A
    # build for oneself is for the cards of this machine, or, where there are none, intermediate code
    # that the driver translates on any card from sm_80 on.
    if(NOT DEFINED CMAKE_CUDA_ARCHITECTURES)
      execute_process(COMMAND nvidia-smi -L RESULT_VARIABLE COSPADI_NO_GPU OUTPUT_QUIET ERROR_QUIET)
      if(COSPADI_CUDA_ALL)
        # sm_86 and sm_89 run the code of sm_80, of the same major version.
        set(CMAKE_CUDA_ARCHITECTURES 80-real 90-real 100-real 120-real 120-virtual)
      elseif(COSPADI_NO_GPU STREQUAL "0")
        set(CMAKE_CUDA_ARCHITECTURES native)
      else()
        set(CMAKE_CUDA_ARCHITECTURES 80-virtual)
      endif()
    endif()
    enable_language(CUDA)
    find_package(CUDAToolkit REQUIRED)
    message(STATUS "cospadi: building with CUDA ${CMAKE_CUDA_COMPILER_VERSION}")
  elseif(COSPADI_CUDA STREQUAL "ON")
    message(FATAL_ERROR
      "COSPADI_CUDA=ON, but no CUDA compiler was found: put nvcc on PATH or set CUDACXX")
  endif()
endif()

function(cospadi_add_cuda target)
  if(NOT COSPADI_HAS_CUDA)
    message(STATUS "cospadi: building without CUDA")
    target_sources(${target} PRIVATE csrc/cuda/unavailable.cpp csrc/cuda/fit_unavailable.cpp)
    return()
  endif()
  set_target_properties(${target} PROPERTIES
    # CMake 3.25 does not know nvcc 13's C++20 flag
    CUDA_STANDARD 17 CUDA_ARCHITECTURES "${CMAKE_CUDA_ARCHITECTURES}" CUDA_RUNTIME_LIBRARY Static
    CUDA_VISIBILITY_PRESET hidden)
  # architectures side by side, on as many threads as there are processors
  target_compile_options(${target} PRIVATE $<$<COMPILE_LANGUAGE:CUDA>:--threads=0>)
  target_sources(${target} PRIVATE
    csrc/cuda/code_steps.cu
    csrc/cuda/device.cu
    csrc/cuda/expand.cu
    csrc/cuda/multiply_dense.cu
    csrc/cuda/multiply_few.cu
    csrc/cuda/multiply_tensor.cu
    csrc/cuda/omp.cu
    csrc/cuda/select.cu)
  target_link_libraries(${target} PUBLIC CUDA::cudart_static)
endfunction()
