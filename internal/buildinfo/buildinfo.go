// Package buildinfo owns the program's version and build facts.
package buildinfo

import (
	"fmt"
	"runtime"
)

// Version is the release's version, set by the linker (-X github.com/doppel-dev/doppel/internal/buildinfo.Version=1.2.3).
var Version = "0.1.0-dev"

// String describes the build in one line.
func String() string {
	return fmt.Sprintf("%s (%s, %s/%s)", Version, runtime.Version(), runtime.GOOS, runtime.GOARCH)
}
