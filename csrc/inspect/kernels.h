// What the developer module can ask of the compiled kernels. Free of torch and of Python.
#pragma once

#include <cstddef>
#include <string>
#include <vector>

namespace maskaccel::inspect {

struct Attributes {
  int registers = 0;
  size_t local_bytes = 0;   // spills and stack of one thread
  size_t shared_bytes = 0;  // static
  size_t constant_bytes = 0;
  int max_threads = 0;
  int ptx_version = 0, binary_version = 0;
};

struct Occupancy {
  int ctas = 0;         // resident on one multiprocessor
  double fraction = 0;  // of the threads it can hold
};

/// Names such as "forward_kernel<bfloat16_t, 2, true, 3, 1>".
std::vector<std::string> kernel_names();
int device_count();
Attributes attributes(const std::string& kernel);
Occupancy occupancy(const std::string& kernel, int threads, size_t dynamic_shared);
/// Milliseconds of each of `launches` raw launches of the bf16 forward on fresh buffers.
std::vector<float> time_forward(int batch, int tokens, int width, bool residual, int launches);

}  // namespace maskaccel::inspect
