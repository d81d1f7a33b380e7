// The operations of the cache on a CPU. Shapes and words are those of hf_kvquant/ops/__init__.py, the arithmetic is
// that of reference.py. One source serves every instruction set.

#include "absmax.h"
#include "attention.h"
#include "read.h"
#include "write.h"
