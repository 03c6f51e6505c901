// Package rawio owns reads and writes of descriptors that never block, of which the scheduler is not told.
//
// Around a system call the runtime lets go of its processor, and whoever looks after that takes it away where others can use it and the call takes longer than some
// 20 µs. To carry 64 KiB takes longer, most of the time: another thread is woken for the processor, and the one that comes back from the call has to get one
// again. A call on a descriptor that never blocks ends soon by itself.
package rawio
