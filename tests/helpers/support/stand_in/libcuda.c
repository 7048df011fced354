// A stand-in for the CUDA driver, for tests on a machine without a GPU. It accepts the modules, tensor maps and launches
// that a driver would accept, and records them. Nothing runs.
#include <elf.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

enum { SUCCESS = 0, INVALID_VALUE = 1, NOT_FOUND = 500 };
enum { MAX_PARAMETERS = 192, MAX_BYTES = 4352, MAX_ATTRIBUTES = 8, MAX_RECORDS = 1024, MAX_RANK = 5 };

typedef struct Function {
  char name[256];
  uint32_t parameters, offset[MAX_PARAMETERS], size[MAX_PARAMETERS];
  uint32_t max_dynamic_shared;
  struct Function* next;
} Function;

typedef struct {
  uint32_t id, value[4];
} Attribute;

typedef struct {
  const Function* function;
  uint64_t stream;
  uint32_t grid[3], block[3], shared, attributes;
  Attribute attribute[MAX_ATTRIBUTES];
  uint8_t bytes[MAX_BYTES];
} Launch;

typedef struct {
  uint64_t address, dims[MAX_RANK], strides[MAX_RANK];
  uint32_t type, rank, box[MAX_RANK], swizzle, l2, fill;
} TensorMap;

static const char MAGIC[8] = "tensor=";  // stands at the beginning of every tensor map, before its number

static Launch launch_records[MAX_RECORDS];
static TensorMap map_records[MAX_RECORDS];
static uint64_t launches, maps, modules;
static int next_launch_result = SUCCESS;

// ---- what the tests read and set
uint64_t stand_in_launches(void) { return launches; }
uint64_t stand_in_maps(void) { return maps; }
uint64_t stand_in_modules(void) { return modules; }
const Launch* stand_in_launch(int i) { return &launch_records[i]; }
const TensorMap* stand_in_map(int i) { return &map_records[i]; }
void stand_in_clear(void) { launches = maps = modules = 0; }
void stand_in_fail_next_launch(int result) { next_launch_result = result; }

// ---- modules. A cubin lists the parameters of a kernel in its section ".nv.info.KERNEL".
enum { INFO_PARAMETER = 0x17, INFO_HAS_BYTES = 4 };

static Function* read_function(const char* name, const uint8_t* at, const uint8_t* end) {
  Function* f = calloc(1, sizeof(Function));
  strncpy(f->name, name, sizeof(f->name) - 1);
  f->max_dynamic_shared = 48 << 10;
  while (at + 4 <= end) {
    uint16_t bytes;
    memcpy(&bytes, at + 2, 2);
    if (at[0] != INFO_HAS_BYTES) {
      at += 4;
      continue;
    }
    if (at[1] == INFO_PARAMETER) {
      uint16_t ordinal, offset;
      uint32_t flags;
      memcpy(&ordinal, at + 8, 2);
      memcpy(&offset, at + 10, 2);
      memcpy(&flags, at + 12, 4);
      if (ordinal >= MAX_PARAMETERS || offset + (flags >> 18) > MAX_BYTES) abort();
      f->offset[ordinal] = offset;
      f->size[ordinal] = flags >> 18;
      if (ordinal >= f->parameters) f->parameters = ordinal + 1;
    }
    at += 4 + bytes;
  }
  return f;
}

int cuModuleLoadData(void** module, const void* image) {
  static const char prefix[] = ".nv.info.";
  const uint8_t* const base = image;
  const Elf64_Ehdr* const header = image;
  if (memcmp(header->e_ident, ELFMAG, SELFMAG) != 0) return INVALID_VALUE;
  const Elf64_Shdr* const sections = (const Elf64_Shdr*)(base + header->e_shoff);
  const char* const names = (const char*)base + sections[header->e_shstrndx].sh_offset;
  Function* first = NULL;
  for (int i = 0; i < header->e_shnum; ++i) {
    const char* const name = names + sections[i].sh_name;
    if (strncmp(name, prefix, sizeof(prefix) - 1) != 0) continue;
    const uint8_t* const info = base + sections[i].sh_offset;
    Function* const f = read_function(name + sizeof(prefix) - 1, info, info + sections[i].sh_size);
    f->next = first;
    first = f;
  }
  *module = first;
  ++modules;
  return first ? SUCCESS : INVALID_VALUE;
}
int cuModuleUnload(void* module) { return SUCCESS; }
int cuModuleGetFunction(void** function, void* module, const char* name) {
  for (Function* f = module; f; f = f->next)
    if (strcmp(f->name, name) == 0) {
      *function = f;
      return SUCCESS;
    }
  return NOT_FOUND;
}
int cuFuncGetAttribute(int* value, int attribute, void* function) {
  enum { MAX_THREADS = 0, REGISTERS = 4 };
  *value = attribute == MAX_THREADS ? 1024 : attribute == REGISTERS ? 128 : 0;
  return SUCCESS;
}
int cuFuncSetAttribute(void* function, int attribute, int value) {
  enum { MAX_DYNAMIC_SHARED = 8, LAST = 15 };  // of the drivers of CUDA 13.0
  if (attribute > LAST) return INVALID_VALUE;
  if (attribute == MAX_DYNAMIC_SHARED) ((Function*)function)->max_dynamic_shared = value;
  return SUCCESS;
}
int cuFuncSetCacheConfig(void* function, int config) { return SUCCESS; }

// ---- tensor maps. The limits are those of the documentation of cuTensorMapEncodeTiled.
int cuTensorMapEncodeTiled(void* map, int type, uint32_t rank, void* address, const uint64_t* dims,
                           const uint64_t* strides, const uint32_t* box, const uint32_t* steps, int interleave,
                           int swizzle, int l2, int fill) {
  static const uint32_t sizes[] = {1, 2, 4, 4, 8, 8, 2, 4, 8, 2, 4, 4, 4}, spans[] = {0, 32, 64, 128};
  if (type < 0 || type > 12 || rank < 1 || rank > MAX_RANK || (uintptr_t)address % 16 || interleave || swizzle > 3)
    return INVALID_VALUE;
  for (uint32_t i = 0; i < rank; ++i) {
    if (dims[i] == 0 || dims[i] > UINT64_C(1) << 32 || box[i] == 0 || box[i] > 256 || steps[i] != 1)
      return INVALID_VALUE;
    if (i + 1 < rank && (strides[i] % 16 || strides[i] >> 40)) return INVALID_VALUE;
  }
  const uint32_t row = box[0] * sizes[type];
  if (row % 16 || (swizzle && row > spans[swizzle])) return INVALID_VALUE;
  if (maps < MAX_RECORDS) {
    TensorMap* const r = &map_records[maps];
    memset(r, 0, sizeof(*r));
    r->address = (uintptr_t)address;
    r->type = type;
    r->rank = rank;
    memcpy(r->dims, dims, rank * 8);
    memcpy(r->strides, strides, (rank - 1) * 8);
    memcpy(r->box, box, rank * 4);
    r->swizzle = swizzle;
    r->l2 = l2;
    r->fill = fill;
  }
  memset(map, 0, 128);
  memcpy(map, MAGIC, 8);
  memcpy((char*)map + 8, &maps, 8);
  ++maps;
  return SUCCESS;
}
int cuTensorMapEncodeIm2col(void) { return INVALID_VALUE; }

// ---- launches
typedef struct {
  uint32_t grid[3], block[3], shared;
  void* stream;
  struct {
    uint32_t id, padding;
    uint32_t value[16];
  }* attributes;
  uint32_t attribute_count;
} Config;

int cuLaunchKernelEx(const Config* config, const Function* f, void** parameters, void** extra) {
  const int result = next_launch_result;
  next_launch_result = SUCCESS;
  if (result != SUCCESS) return result;
  uint64_t threads = 1;
  for (int i = 0; i < 3; ++i) {
    if (config->grid[i] == 0 || config->block[i] == 0) return INVALID_VALUE;
    threads *= config->block[i];
  }
  if (threads > 1024 || config->shared > f->max_dynamic_shared || config->attribute_count > MAX_ATTRIBUTES)
    return INVALID_VALUE;
  if (launches < MAX_RECORDS) {
    Launch* const r = &launch_records[launches];
    r->function = f;
    r->stream = (uintptr_t)config->stream;
    memcpy(r->grid, config->grid, sizeof(r->grid));
    memcpy(r->block, config->block, sizeof(r->block));
    r->shared = config->shared;
    r->attributes = config->attribute_count;
    for (uint32_t i = 0; i < config->attribute_count; ++i) {
      r->attribute[i].id = config->attributes[i].id;
      memcpy(r->attribute[i].value, config->attributes[i].value, 16);
    }
    for (uint32_t i = 0; i < f->parameters; ++i) memcpy(r->bytes + f->offset[i], parameters[i], f->size[i]);
  }
  ++launches;
  return SUCCESS;
}
int cuOccupancyMaxActiveClusters(int* count, void* function, const void* config) { return *count = 66, SUCCESS; }

// ---- the device, its context, and errors
int cuInit(unsigned flags) { return SUCCESS; }
int cuDriverGetVersion(int* version) { return *version = 13000, SUCCESS; }
int cuDeviceGet(int* device, int ordinal) { return *device = ordinal, SUCCESS; }
int cuDeviceGetAttribute(int* value, int attribute, int device) {
  enum { WARP = 10, MULTIPROCESSORS = 16, SHARED_PER_MULTIPROCESSOR = 81, SHARED_PER_BLOCK_OPTIN = 97 };
  *value = attribute == WARP                        ? 32
           : attribute == MULTIPROCESSORS           ? 132
           : attribute == SHARED_PER_MULTIPROCESSOR ? 233472
           : attribute == SHARED_PER_BLOCK_OPTIN    ? 232448
                                                    : 1;
  return SUCCESS;
}
int cuDevicePrimaryCtxRetain(void** context, int device) { return *context = &launches, SUCCESS; }
int cuCtxGetCurrent(void** context) { return *context = &launches, SUCCESS; }
int cuCtxSetCurrent(void* context) { return SUCCESS; }
int cuCtxGetDevice(int* device) { return *device = 0, SUCCESS; }
int cuCtxGetLimit(size_t* value, int limit) { return *value = 0, SUCCESS; }
int cuCtxSetLimit(int limit, size_t value) { return SUCCESS; }
int cuStreamIsCapturing(void* stream, int* status) { return *status = 0, SUCCESS; }
int cuPointerGetAttribute(uint64_t* value, int attribute, uint64_t pointer) { return *value = pointer, SUCCESS; }
int cuGetErrorString(int error, const char** text) { return *text = "an error of the stand-in", SUCCESS; }
int cuGetErrorName(int error, const char** text) { return *text = "STAND_IN_ERROR", SUCCESS; }
