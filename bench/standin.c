/* A pretended CUDA driver: what Triton's launcher asks of libcuda, on a machine without a GPU.

   Modules are read as the real driver reads them (ELF, `.nv.info`: registers, threads, the offset and size of every
   parameter); a launch is checked, recorded and not run. cuInit says that there is no device, so that nobody but
   Triton's launcher, which does not call it, takes this for a GPU. What is not here is refused, with the reason. */

#include <elf.h>
#include <pthread.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "cuda.h"

enum { PARAM_BYTES = 4096, PARAMS = 512, RING = 1024 };

typedef struct {
  uint16_t offset, size; /* bytes */
  int32_t pointer;       /* to global memory */
} Param;

typedef struct {
  char name[256];
  int32_t registers, local, threads; /* per thread, bytes per thread, most per block */
  int32_t dynamic;                   /* shared memory that a launch may ask for, bytes */
  int32_t bytes, count;              /* of all parameters with their gaps; how many */
  Param params[PARAMS];
} Function;

typedef struct {
  const Function *function;
  uint64_t stream;
  uint32_t grid[3], block[3], shared, bytes;
  unsigned char params[PARAM_BYTES];
} Launch;

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static Launch ring[RING];
static uint64_t launched;
static int capability, shared_limit; /* 90; bytes per block */
static _Thread_local CUcontext current;
static _Thread_local char why[512];
static _Thread_local CUresult why_code;

static CUresult refuse(CUresult code, const char *format, ...) {
  va_list values;
  va_start(values, format);
  int used = snprintf(why, sizeof why, "pretended driver: ");
  vsnprintf(why + used, sizeof why - used, format, values);
  va_end(values);
  return why_code = code;
}

/* --- for Python ------------------------------------------------------------------------------------------------- */

void standin_clear(void) {
  pthread_mutex_lock(&lock);
  launched = 0;
  pthread_mutex_unlock(&lock);
}

void standin_open(int of_capability, int of_shared_limit) {
  capability = of_capability;
  shared_limit = of_shared_limit;
  standin_clear();
}

uint64_t standin_count(void) {
  pthread_mutex_lock(&lock);
  uint64_t count = launched;
  pthread_mutex_unlock(&lock);
  return count;
}

/* Copies the launches that are still held to `into` (room for RING), oldest first: how many. */
int standin_launches(Launch *into) {
  pthread_mutex_lock(&lock);
  int held = launched < RING ? (int)launched : RING;
  for (int i = 0; i < held; ++i) {
    const Launch *from = &ring[(launched - held + i) % RING];
    memcpy(&into[i], from, offsetof(Launch, params) + from->bytes);
  }
  pthread_mutex_unlock(&lock);
  return held;
}

int standin_ring(void) { return RING; }

/* --- device and context ----------------------------------------------------------------------------------------- */

CUresult cuInit(unsigned flags) { return refuse(CUDA_ERROR_NO_DEVICE, "there is no device (cuInit(%u))", flags); }

CUresult cuDeviceGetCount(int *count) {
  *count = 0;
  return CUDA_SUCCESS;
}

CUresult cuDriverGetVersion(int *version) {
  *version = CUDA_VERSION;
  return CUDA_SUCCESS;
}

CUresult cuGetErrorString(CUresult code, const char **text) {
  *text = code == CUDA_SUCCESS ? "no error" : code == why_code ? why : "pretended driver: an error of no known reason";
  return CUDA_SUCCESS;
}

CUresult cuDeviceGet(CUdevice *device, int ordinal) {
  *device = ordinal;
  return CUDA_SUCCESS;
}

CUresult cuDeviceGetAttribute(int *value, CUdevice_attribute attribute, CUdevice device) {
  switch ((int)attribute) {
  case CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR:
    *value = capability / 10;
    return CUDA_SUCCESS;
  case CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR:
    *value = capability % 10;
    return CUDA_SUCCESS;
  case CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN:
    *value = shared_limit;
    return CUDA_SUCCESS;
  case CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_MULTIPROCESSOR: /* 1 KB of every block is the system's */
    *value = shared_limit + 1024;
    return CUDA_SUCCESS;
  case CU_DEVICE_ATTRIBUTE_MAX_REGISTERS_PER_BLOCK:
    *value = 65536;
    return CUDA_SUCCESS;
  case CU_DEVICE_ATTRIBUTE_WARP_SIZE:
    *value = 32;
    return CUDA_SUCCESS;
  case CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT: /* what no architecture settles is 0: unknown */
  case CU_DEVICE_ATTRIBUTE_CLOCK_RATE:
  case CU_DEVICE_ATTRIBUTE_MEMORY_CLOCK_RATE:
  case CU_DEVICE_ATTRIBUTE_GLOBAL_MEMORY_BUS_WIDTH:
    *value = 0;
    return CUDA_SUCCESS;
  }
  return refuse(CUDA_ERROR_NOT_SUPPORTED, "device attribute %d of device %d is not known", attribute, device);
}

CUresult cuDevicePrimaryCtxRetain(CUcontext *context, CUdevice device) {
  *context = (CUcontext)(uintptr_t)(device + 1);
  return CUDA_SUCCESS;
}

CUresult cuCtxGetCurrent(CUcontext *context) {
  *context = current;
  return CUDA_SUCCESS;
}

CUresult cuCtxSetCurrent(CUcontext context) {
  current = context;
  return CUDA_SUCCESS;
}

CUresult cuCtxGetDevice(CUdevice *device) {
  if (!current)
    return refuse(CUDA_ERROR_INVALID_CONTEXT, "no context is current in this thread");
  *device = (CUdevice)((uintptr_t)current - 1);
  return CUDA_SUCCESS;
}

CUresult cuCtxGetLimit(size_t *value, CUlimit limit) {
  return refuse(CUDA_ERROR_NOT_SUPPORTED, "limit %d is not kept", limit);
}

CUresult cuCtxSetLimit(CUlimit limit, size_t value) {
  return refuse(CUDA_ERROR_NOT_SUPPORTED, "limit %d is not kept and cannot become %zu", limit, value);
}

CUresult cuStreamIsCapturing(CUstream stream, CUstreamCaptureStatus *status) {
  *status = CU_STREAM_CAPTURE_STATUS_NONE;
  return CUDA_SUCCESS;
}

/* Any memory of this process stands for the device's. */
CUresult cuPointerGetAttribute(void *value, CUpointer_attribute attribute, CUdeviceptr pointer) {
  if (attribute != CU_POINTER_ATTRIBUTE_DEVICE_POINTER)
    return refuse(CUDA_ERROR_NOT_SUPPORTED, "pointer attribute %d is not known", attribute);
  *(CUdeviceptr *)value = pointer;
  return CUDA_SUCCESS;
}

/* --- modules ---------------------------------------------------------------------------------------------------- */

typedef struct {
  const unsigned char *image;
  const Elf64_Shdr *sections;
  int count;
  const char *names;
} Elf;

static Elf elf(const void *image) {
  const Elf64_Ehdr *head = image;
  const Elf64_Shdr *sections = (const void *)((const char *)image + head->e_shoff);
  const char *names = (const char *)image + sections[head->e_shstrndx].sh_offset;
  return (Elf){image, sections, head->e_shnum, names};
}

static const Elf64_Shdr *section(Elf e, const char *name) {
  for (int i = 0; i < e.count; ++i)
    if (!strcmp(e.names + e.sections[i].sh_name, name))
      return &e.sections[i];
  return NULL;
}

/* The 4-byte words of the next entry called `attribute` in an .nv.info section, from *at on; NULL after the last. */
static const uint32_t *next(Elf e, const Elf64_Shdr *info, int attribute, size_t *at) {
  while (*at + 4 <= info->sh_size) {
    const unsigned char *entry = e.image + info->sh_offset + *at;
    int sized = entry[0] == 4; /* else the value is in the two bytes of the size */
    *at += 4 + (sized ? entry[2] | entry[3] << 8 : 0);
    if (sized && entry[1] == attribute)
      return (const uint32_t *)(entry + 4);
  }
  return NULL;
}

/* What the module's .nv.info says of function `name` under `attribute`, or `otherwise`. */
static int32_t of_function(Elf e, const char *name, int attribute, int32_t otherwise) {
  const Elf64_Shdr *info = section(e, ".nv.info");
  if (!info)
    return otherwise;
  const Elf64_Shdr *table = &e.sections[info->sh_link];
  const Elf64_Sym *symbols = (const void *)(e.image + table->sh_offset);
  const char *strings = (const char *)e.image + e.sections[table->sh_link].sh_offset;
  size_t at = 0;
  for (const uint32_t *words; (words = next(e, info, attribute, &at));)
    if (!strcmp(strings + symbols[words[0]].st_name, name))
      return (int32_t)words[1];
  return otherwise;
}

enum { MAX_THREADS = 0x05, REQUIRED_THREADS = 0x10, FRAME_SIZE = 0x11, PARAM_INFO = 0x17, REGISTERS = 0x2f };

CUresult cuModuleLoadData(CUmodule *module, const void *image) {
  const Elf64_Ehdr *head = image;
  if (memcmp(head->e_ident, ELFMAG, SELFMAG) || head->e_ident[EI_CLASS] != ELFCLASS64 || head->e_machine != 190)
    return refuse(CUDA_ERROR_INVALID_IMAGE, "the module is no 64-bit ELF for CUDA");
  Elf e = elf(image);
  size_t size = head->e_shoff + (size_t)head->e_shnum * sizeof(Elf64_Shdr);
  for (int i = 0; i < e.count; ++i) {
    size_t end = e.sections[i].sh_type == SHT_NOBITS ? 0 : e.sections[i].sh_offset + e.sections[i].sh_size;
    size = end > size ? end : size;
  }
  void *copy = malloc(size);
  if (!copy)
    return refuse(CUDA_ERROR_OUT_OF_MEMORY, "no memory for a module of %zu bytes", size);
  *module = memcpy(copy, image, size);
  return CUDA_SUCCESS;
}

CUresult cuModuleUnload(CUmodule module) { /* its functions stay: records name them */
  free(module);
  return CUDA_SUCCESS;
}

CUresult cuModuleGetFunction(CUfunction *function, CUmodule module, const char *name) {
  Elf e = elf(module);
  char wanted[sizeof((Function *)0)->name + 16];
  snprintf(wanted, sizeof wanted, ".nv.info.%s", name);
  const Elf64_Shdr *info = section(e, wanted);
  if (!info || strlen(name) >= sizeof((Function *)0)->name)
    return refuse(CUDA_ERROR_NOT_FOUND, "the module has no kernel %s", name);
  Function *f = calloc(1, sizeof *f);
  if (!f)
    return refuse(CUDA_ERROR_OUT_OF_MEMORY, "no memory for kernel %s", name);
  strcpy(f->name, name);
  f->registers = of_function(e, name, REGISTERS, 0);
  f->local = of_function(e, name, FRAME_SIZE, 0);
  f->dynamic = 48 * 1024; /* until more is asked for */
  size_t at = 0;
  const uint32_t *threads = next(e, info, REQUIRED_THREADS, &at);
  if (!threads)
    threads = next(e, info, MAX_THREADS, (at = 0, &at));
  f->threads = threads ? (int32_t)(threads[0] * threads[1] * threads[2]) : 1024;
  at = 0;
  for (const uint32_t *words; (words = next(e, info, PARAM_INFO, &at));) {
    unsigned ordinal = words[1] & 0xffff, offset = words[1] >> 16, size = words[2] >> 18;
    if (ordinal >= PARAMS || offset + size > PARAM_BYTES) {
      free(f);
      return refuse(CUDA_ERROR_NOT_SUPPORTED, "parameter %u of %s is beyond %d parameters or %d bytes", ordinal, name,
                    PARAMS, PARAM_BYTES);
    }
    f->params[ordinal] = (Param){offset, size, (words[2] >> 8 & 0xf) == 4};
    f->count = (int32_t)ordinal >= f->count ? (int32_t)ordinal + 1 : f->count;
    f->bytes = (int32_t)(offset + size) > f->bytes ? (int32_t)(offset + size) : f->bytes;
  }
  *function = (CUfunction)f;
  return CUDA_SUCCESS;
}

CUresult cuFuncGetAttribute(int *value, CUfunction_attribute attribute, CUfunction function) {
  const Function *f = (const Function *)function;
  switch ((int)attribute) {
  case CU_FUNC_ATTRIBUTE_NUM_REGS:
    *value = f->registers;
    return CUDA_SUCCESS;
  case CU_FUNC_ATTRIBUTE_LOCAL_SIZE_BYTES:
    *value = f->local;
    return CUDA_SUCCESS;
  case CU_FUNC_ATTRIBUTE_MAX_THREADS_PER_BLOCK:
    *value = f->threads;
    return CUDA_SUCCESS;
  case CU_FUNC_ATTRIBUTE_SHARED_SIZE_BYTES: /* Triton's is all dynamic; .nv.shared has the system's KB from sm_90 on */
    *value = 0;
    return CUDA_SUCCESS;
  }
  return refuse(CUDA_ERROR_NOT_SUPPORTED, "attribute %d of %s is not known", attribute, f->name);
}

CUresult cuFuncSetAttribute(CUfunction function, CUfunction_attribute attribute, int value) {
  Function *f = (Function *)function;
  switch ((int)attribute) {
  case CU_FUNC_ATTRIBUTE_NON_PORTABLE_CLUSTER_SIZE_ALLOWED:
    return CUDA_SUCCESS;
  case CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES:
    if (value < 0 || value > shared_limit)
      return refuse(CUDA_ERROR_INVALID_VALUE, "%d bytes of shared memory for %s, of %d", value, f->name, shared_limit);
    f->dynamic = value;
    return CUDA_SUCCESS;
  }
  return refuse(CUDA_ERROR_NOT_SUPPORTED, "attribute %d of %s cannot be set", attribute, f->name);
}

CUresult cuFuncSetCacheConfig(CUfunction function, CUfunc_cache config) { return CUDA_SUCCESS; }

/* --- launches --------------------------------------------------------------------------------------------------- */

CUresult cuLaunchKernelEx(const CUlaunchConfig *c, CUfunction function, void **params, void **extra) {
  const Function *f = (const Function *)function;
  if (!current)
    return refuse(CUDA_ERROR_INVALID_CONTEXT, "%s: no context is current in this thread", f->name);
  if (extra)
    return refuse(CUDA_ERROR_NOT_SUPPORTED, "%s: parameters packed by the caller are not read", f->name);
  uint64_t threads = (uint64_t)c->blockDimX * c->blockDimY * c->blockDimZ;
  if (threads == 0 || threads > (uint64_t)f->threads)
    return refuse(CUDA_ERROR_INVALID_VALUE, "%s: %llu threads in a block, of 1 to %d", f->name,
                  (unsigned long long)threads, f->threads);
  if (c->gridDimX - 1 >= INT32_MAX || c->gridDimY - 1 >= 65535 || c->gridDimZ - 1 >= 65535)
    return refuse(CUDA_ERROR_INVALID_VALUE, "%s: a grid of %u x %u x %u", f->name, c->gridDimX, c->gridDimY,
                  c->gridDimZ);
  if (c->sharedMemBytes > (unsigned)f->dynamic)
    return refuse(CUDA_ERROR_INVALID_VALUE, "%s: %u bytes of shared memory, of %d", f->name, c->sharedMemBytes,
                  f->dynamic);
  pthread_mutex_lock(&lock);
  Launch *launch = &ring[launched++ % RING];
  launch->function = f;
  launch->stream = (uint64_t)(uintptr_t)c->hStream;
  memcpy(launch->grid, (unsigned[]){c->gridDimX, c->gridDimY, c->gridDimZ}, sizeof launch->grid);
  memcpy(launch->block, (unsigned[]){c->blockDimX, c->blockDimY, c->blockDimZ}, sizeof launch->block);
  launch->shared = c->sharedMemBytes;
  launch->bytes = f->bytes;
  memset(launch->params, 0, f->bytes);
  for (int i = 0; i < f->count; ++i)
    memcpy(launch->params + f->params[i].offset, params[i], f->params[i].size);
  pthread_mutex_unlock(&lock);
  return CUDA_SUCCESS;
}
