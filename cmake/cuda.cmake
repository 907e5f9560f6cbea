# Adds the CUDA kernels to the target `maskaccel`.
#
#   MASKACCEL_CUDA_ARCHS          GPU targets, such as "80;90a"; machine code for each, and PTX for the newest that has no
#                                 architecture suffix, so that later GPUs can run it
#   MASKACCEL_CUTLASS_INCLUDE     directory that holds cutlass/; empty: the one in the nvidia-cutlass wheel
set(MASKACCEL_CUDA_ARCHS "80;86;89;90a;100;120" CACHE STRING "GPU targets of the CUDA kernels")
set(MASKACCEL_CUTLASS_INCLUDE "" CACHE PATH "CUTLASS headers")

set(CMAKE_CUDA_ARCHITECTURES OFF)  # the flags are spelled out below
enable_language(CUDA)

set(cutlass_include "${MASKACCEL_CUTLASS_INCLUDE}")
if(NOT cutlass_include)
  find_package(Python3 REQUIRED COMPONENTS Interpreter)
  execute_process(
    COMMAND "${Python3_EXECUTABLE}" -c
            "import importlib.util as u; s = u.find_spec('cutlass_library'); print(s.submodule_search_locations[0] if s else '')"
    OUTPUT_VARIABLE cutlass_root OUTPUT_STRIP_TRAILING_WHITESPACE COMMAND_ERROR_IS_FATAL ANY)
  set(cutlass_include "${cutlass_root}/source/include")
endif()
if(NOT EXISTS "${cutlass_include}/cutlass/array.h")
  message(FATAL_ERROR "CUTLASS headers not found at '${cutlass_include}'. Install requirements/cuda.txt with `pip install --no-deps -r`, "
                      "or set MASKACCEL_CUTLASS_INCLUDE to a CUTLASS include directory.")
endif()

set(gencode)
set(newest)
foreach(arch IN LISTS MASKACCEL_CUDA_ARCHS)
  list(APPEND gencode "SHELL:-gencode arch=compute_${arch},code=sm_${arch}")
  if(arch MATCHES "^[0-9]+$" AND (NOT newest OR arch GREATER newest))
    set(newest ${arch})
  endif()
endforeach()
if(newest)
  list(APPEND gencode "SHELL:-gencode arch=compute_${newest},code=compute_${newest}")
endif()

set(cuda_common --expt-relaxed-constexpr -Xfatbin=-compress-all)
if(CMAKE_CUDA_COMPILER_VERSION VERSION_GREATER_EQUAL 12.9)
  list(APPEND cuda_common --compress-mode=size)
endif()
set(cuda_options ${gencode} ${cuda_common})

target_sources(maskaccel PRIVATE
  csrc/common/cuda_device.cu
  csrc/adaln/cuda_norm.cu csrc/adaln/cuda_norm_backward.cu csrc/adaln/cuda_qk.cu csrc/adaln/cuda_activation.cu
  csrc/steps/cuda_steps.cu csrc/steps/cuda_gram.cu csrc/steps/cuda_sites.cu
  csrc/steps/cuda_normed.cu csrc/steps/cuda_scatter.cu csrc/steps/cuda_kmeans.cu
  csrc/attention/cuda.cu csrc/attention/cuda_sm80.cu csrc/attention/cuda_sm80_backward.cu csrc/attention/cuda_sm80_sums.cu
  csrc/attention/cuda_lists.cu csrc/attention/cuda_merge.cu
  csrc/tokens/cuda_choose.cu csrc/tokens/cuda_gather.cu csrc/tokens/cuda_scatter_merge.cu
  csrc/tokens/cuda_gather_modulate.cu csrc/tokens/cuda_kv.cu csrc/tokens/cuda_match.cu csrc/tokens/cuda_sample.cu)
target_include_directories(maskaccel SYSTEM PRIVATE "${cutlass_include}")

# wgmma exists on sm_90a alone, so these sources are compiled for nothing else.
if("90a" IN_LIST MASKACCEL_CUDA_ARCHS)
  add_library(maskaccel_sm90 OBJECT csrc/attention/cuda_sm90.cu csrc/attention/cuda_sm90_backward.cu)
  target_include_directories(maskaccel_sm90 SYSTEM PRIVATE "${cutlass_include}" "${MASKACCEL_TORCH_DIR}/include")
  target_compile_definitions(maskaccel_sm90 PRIVATE USE_CUDA ${MASKACCEL_DEFINITIONS})
  target_compile_options(maskaccel_sm90 PRIVATE "SHELL:-gencode arch=compute_90a,code=sm_90a" ${cuda_common})
  set_target_properties(maskaccel_sm90 PROPERTIES CUDA_ARCHITECTURES OFF CUDA_STANDARD 17 CUDA_STANDARD_REQUIRED ON
                        CUDA_VISIBILITY_PRESET hidden)
  foreach(target maskaccel maskaccel_sm90)
    target_compile_definitions(${target} PRIVATE $<$<COMPILE_LANGUAGE:CUDA>:MASKACCEL_SM90A>)
  endforeach()
  target_link_libraries(maskaccel PRIVATE maskaccel_sm90)
endif()
target_compile_definitions(maskaccel PRIVATE $<$<COMPILE_LANGUAGE:CUDA>:USE_CUDA>)
target_compile_options(maskaccel PRIVATE "$<$<COMPILE_LANGUAGE:CUDA>:${cuda_options}>")
set_target_properties(maskaccel PROPERTIES CUDA_ARCHITECTURES OFF CUDA_STANDARD 17 CUDA_STANDARD_REQUIRED ON
                      CUDA_RUNTIME_LIBRARY Static CUDA_VISIBILITY_PRESET hidden)
