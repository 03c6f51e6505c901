//go:build !linux

package tunnel

// tune does nothing: Go sets TCP_NODELAY by itself, and the other options are Linux's.
func tune(uintptr) error { return nil }
