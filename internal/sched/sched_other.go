//go:build !linux

package sched

import "log/slog"

// Batch does nothing: there is no such policy here.
func Batch(*slog.Logger) {}
