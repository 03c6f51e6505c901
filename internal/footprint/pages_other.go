//go:build !linux

package footprint

func forgetProgram() error { return nil }
