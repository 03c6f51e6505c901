//go:build !linux

package agent

import "os"

// Environ returns the environment that the agent was started with.
func Environ() ([]string, error) { return os.Environ(), nil }
