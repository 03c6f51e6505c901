//go:build !linux

package rootd

import (
	"context"
	"os"

	"github.com/doppel-dev/doppel/internal/uerr"
)

// Server is not supported here yet.
type Server struct{}

// New is not supported here yet.
func New(cfg Config) (*Server, error) {
	if _, err := cfg.withDefaults(); err != nil {
		return nil, err
	}
	return nil, uerr.New(uerr.Internal, "use doppel on Linux, or in a Linux virtual machine (WSL 2)", "doppel-rootd is not supported on this operating system yet")
}

// Run is not supported here yet.
func (s *Server) Run(ctx context.Context) error { return nil }

// OpenLog opens a log file to append to, standard error for "".
func OpenLog(path string, uid int) (*os.File, error) {
	if path == "" {
		return os.Stderr, nil
	}
	return os.OpenFile(path, os.O_WRONLY|os.O_APPEND|os.O_CREATE, 0o640)
}
