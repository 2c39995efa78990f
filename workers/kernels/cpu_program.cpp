// Programs: a recorded sequence of kernel calls that runs as one call, for any number of tokens.
//
// What a captured graph is to a GPU, on a CPU: no Python and no dispatcher between kernels, and one parallel region
// for all of them. workers/kernels/program.py records and lays out memory; this file only runs what it is given.

#include <cstring>
#include <tuple>

#include "cpu_kernels.h"
#include "cpu_parallel.h"

namespace {

enum Kind { CONSTANT, PER_TOKEN, BASED, THREADS };  // as in program.py

// The operands of one instruction, made concrete in order.
class Operands {
 public:
  Operands(const WgInstruction& instruction, char* const* bases, int64_t num_tokens, int threads)
      : next_(instruction.operands), bases_(bases), num_tokens_(num_tokens), threads_(threads) {}

  template <class T>
  T take() {
    const int64_t value = concrete(*next_++);
    if constexpr (std::is_pointer_v<T>) {
      return reinterpret_cast<T>(value);
    } else if constexpr (std::is_same_v<T, float>) {
      float result;
      memcpy(&result, &value, 4);
      return result;
    } else {
      return T(value);
    }
  }

 private:
  int64_t concrete(const WgOperand& operand) const {
    switch (operand.kind) {
      case PER_TOKEN: return operand.value * num_tokens_;
      case BASED: return reinterpret_cast<int64_t>(bases_[operand.base]) + operand.value;
      case THREADS: return threads_;
      default: return operand.value;
    }
  }

  const WgOperand* next_;
  char* const* bases_;
  int64_t num_tokens_;
  int threads_;
};

template <class... Args>
void call(void (*kernel)(Args...), Operands operands) {
  std::apply(kernel, std::tuple<Args...>{operands.take<Args>()...});  // braces evaluate from left to right
}

void run_instruction(const WgInstruction& instruction, const Operands& operands) {
  switch (instruction.kernel) {  // numbered as in program.py
    case 0: return call(wg_copy_rows, operands);
    case 1: return call(wg_unpack_rows, operands);
    case 2: return call(wg_linear, operands);
    case 3: return call(wg_rms_norm, operands);
    case 4: return call(wg_silu_and_mul, operands);
    case 5: return call(wg_rope, operands);
    case 6: return call(wg_attention, operands);
  }
}

}  // namespace

void wg_run_program(const WgInstruction* instructions, int64_t count, void* const* bases, int64_t num_tokens,
                    int threads) {
  wg::with_team(threads, [&] {
    for (int64_t i = 0; i < count; i++)
      run_instruction(instructions[i], {instructions[i], reinterpret_cast<char* const*>(bases), num_tokens, threads});
  });
}
