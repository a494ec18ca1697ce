// The bodies of what light kernels call, compiled once a machine and linked to each of them.
#define OPKIT_OP ::opkit::op_name
#define OPKIT_BODY __attribute__((noinline))
#include <opkit/glue.h>
