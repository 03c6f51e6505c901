// Package sched owns how the kernel schedules the processes that carry traffic.
package sched
