// Compiled once per instruction set; see common/isa.h.
#include "cpu_activation.h"
#include "cpu_backward.h"
#include "cpu_forward.h"
#include "cpu_qk.h"

namespace maskaccel {
namespace MASKACCEL_ISA {

const AdalnKernels adaln_kernels = {forward,    backward,           reduce, qk_forward, qk_backward,
                                    activation, activation_backward};

}  // namespace MASKACCEL_ISA
}  // namespace maskaccel
