//go:build !linux

package mount

import (
	"context"
	"errors"
)

// ErrNoFUSE says that this machine cannot mount anything for a user.
var ErrNoFUSE = errors.New("mounting is there on Linux only")

// FS is a mounted file system.
type FS struct{}

// Mount mounts nothing here.
func Mount(context.Context, Config) (*FS, error) { return nil, ErrNoFUSE }

func unmount(string) error { return ErrNoFUSE }

func dying(context.Context) bool { return true }

// Close does nothing.
func (*FS) Close() {}

// Gone is never closed.
func (*FS) Gone() <-chan struct{} { return nil }
