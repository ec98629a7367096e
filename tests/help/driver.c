// SPDX-License-Identifier: Apache-2.0
// As much of CUDA's driver as a launch needs: it does nothing, and writes down what it is asked.
//
// Two devices; the context of device d is 0x1000 + d, every kernel is 0x3000. Each launch is a line
// in $DRIVER_LOG: context, kernel, grid, block, stream, then $DRIVER_ARGUMENTS arguments, 64 bits each.
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static _Thread_local void* current;

static FILE* journal(void) {
  static FILE* file;
  if (!file) file = fopen(getenv("DRIVER_LOG"), "w");
  return file;
}

static int init(unsigned flags) { return 0; }
static int version(int* v) { return *v = 13000, 0; }
static int count(int* n) { return *n = 2, 0; }
static int device(int* d, int ordinal) { return *d = ordinal, 0; }
static int retain(void** context, int d) { return *context = (void*)(uintptr_t)(0x1000 + d), 0; }
static int release(int d) { return 0; }
static int set_current(void* context) { return current = context, 0; }
static int get_current(void** context) { return *context = current, 0; }
static int context_device(int* d) { return *d = (int)(uintptr_t)current - 0x1000, 0; }
static int load(void** library, const void* code, void* a, void* b, unsigned n, void* c, void* d,
                unsigned m) {
  fprintf(journal(), "load %.3s\n", (const char*)code + 1);
  return *library = (void*)0x2000, 0;
}
static int unload(void* library) { return 0; }
static int kernel(void** found, void* library, const char* name) {
  fprintf(journal(), "kernel %s\n", name);
  return *found = (void*)0x3000, 0;
}

// CUlaunchConfig: grid, block, bytes of shared memory, stream, attributes.
struct Config {
  unsigned grid[3], block[3], shared;
  void *stream, *attributes;
  unsigned count;
};

static int launch(const struct Config* c, void* f, void** arguments, void** extra) {
  fprintf(journal(), "launch %p %p %u,%u,%u %u,%u,%u %u %#llx", current, f, c->grid[0], c->grid[1],
          c->grid[2], c->block[0], c->block[1], c->block[2], c->shared,
          (unsigned long long)(uintptr_t)c->stream);
  for (int i = 0; i < atoi(getenv("DRIVER_ARGUMENTS")); ++i) {
    uint64_t value;
    memcpy(&value, arguments[i], sizeof value);
    fprintf(journal(), " %llx", (unsigned long long)value);
  }
  fprintf(journal(), "\n");
  return fflush(journal());
}

static const struct { const char* name; void* function; } functions[] = {
  {"cuInit", init}, {"cuDriverGetVersion", version}, {"cuDeviceGetCount", count},
  {"cuDeviceGet", device}, {"cuDevicePrimaryCtxRetain", retain},
  {"cuDevicePrimaryCtxRelease", release}, {"cuCtxSetCurrent", set_current},
  {"cuCtxGetCurrent", get_current}, {"cuCtxGetDevice", context_device},
  {"cuLibraryLoadData", load}, {"cuLibraryUnload", unload}, {"cuLibraryGetKernel", kernel},
  {"cuLaunchKernelEx", launch},
};

// What all others are found by. 500: there is no function of this name.
int cuGetProcAddress_v2(const char* name, void** found, int v, uint64_t flags, int* status) {
  for (unsigned i = 0; i < sizeof functions / sizeof *functions; ++i)
    if (!strcmp(functions[i].name, name)) {
      if (status) *status = 0;
      return *found = functions[i].function, 0;
    }
  if (status) *status = 1;
  return *found = 0, 500;
}
