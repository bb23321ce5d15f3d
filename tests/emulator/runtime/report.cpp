#include "report.h"

#include <dlfcn.h>
#include <execinfo.h>

#include <cstdint>
#include <cstdio>

namespace emu {

std::vector<void*> call_stack() {
  std::vector<void*> frames(64);
  frames.resize(static_cast<size_t>(backtrace(frames.data(), static_cast<int>(frames.size()))));
  return frames;
}

std::string source_lines(const std::vector<void*>& call_stack) {
  Dl_info library;
  if (dladdr(reinterpret_cast<void*>(&source_lines), &library) == 0) return "";
  std::string command = std::string("addr2line -ifCe '") + library.dli_fname + "'";
  for (const void* address : call_stack) {
    char text[32];
    const auto call = reinterpret_cast<uintptr_t>(address) - reinterpret_cast<uintptr_t>(library.dli_fbase) - 1;
    std::snprintf(text, sizeof text, " 0x%zx", static_cast<size_t>(call));
    command += text;
  }
  std::FILE* answer = popen((command + " 2>&1").c_str(), "r");
  if (answer == nullptr) return "";
  // Two lines per call: the function, then the file and line.
  std::string text, function, found;
  for (int c = 0; (c = std::fgetc(answer)) != EOF;)
    if (c != '\n') {
      text += static_cast<char>(c);
    } else if (function.empty()) {
      std::swap(function, text);
    } else {
      if (text.find(".cu:") != std::string::npos || text.find(".cuh:") != std::string::npos)
        found += "\n  at " + text.substr(0, text.find(" (")) + " in " + function;
      text.clear();
      function.clear();
    }
  pclose(answer);
  return found;
}

}  // namespace emu
