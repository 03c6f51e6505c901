package agent

import (
	"bytes"
	"fmt"
	"io"
	"os"
	"runtime"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/doppel-dev/doppel/internal/environ"
)

// envFile names the descriptor through which Environ finds what it took away.
const envFile = "DOPPEL_ENVIRON_FD"

// Environ returns the environment that the agent was started with, the apps' variables included, and takes those out of the process: what is in
// an environment at the start stays readable in /proc and is inherited. It starts the program once more, with the variables in a file in memory.
func Environ() ([]string, error) {
	if fd, err := strconv.Atoi(os.Getenv(envFile)); err == nil {
		f := os.NewFile(uintptr(fd), "environ")
		defer f.Close()
		_ = os.Unsetenv(envFile)
		b, err := io.ReadAll(io.NewSectionReader(f, 0, 1<<30))
		if err != nil {
			return nil, fmt.Errorf("read the apps' environment: %w", err)
		}
		all := os.Environ()
		for kv := range bytes.SplitSeq(b, []byte{0}) {
			if len(kv) > 0 {
				all = append(all, string(kv))
			}
		}
		return all, nil
	}
	var own, apps []string
	for _, kv := range os.Environ() {
		if strings.HasPrefix(kv, environ.Prefix) {
			apps = append(apps, kv)
		} else {
			own = append(own, kv)
		}
	}
	if len(apps) == 0 {
		return own, nil
	}
	fd, err := unix.MemfdCreate("environ", 0) // stays open across exec
	if err != nil {
		return nil, os.NewSyscallError("memfd_create", err)
	}
	f := os.NewFile(uintptr(fd), "environ")
	defer runtime.KeepAlive(f) // the collector would close it before it is inherited
	if _, err := f.WriteString(strings.Join(apps, "\x00")); err != nil {
		return nil, err
	}
	return nil, fmt.Errorf("start again: %w", unix.Exec("/proc/self/exe", os.Args, append(own, envFile+"="+strconv.Itoa(fd))))
}
