package userd

import (
	"context"
	"runtime/debug"
	"runtime/pprof"
	"strings"

	"github.com/doppel-dev/doppel/internal/localapi"
)

// stacks says what the daemon's goroutines do.
func stacks(_ context.Context, req localapi.StacksRequest, _ localapi.Progress) (localapi.Stacks, error) {
	if req.Collect {
		debug.FreeOSMemory()
	}
	all := pprof.Lookup("goroutine")
	var text strings.Builder
	err := all.WriteTo(&text, 1)
	return localapi.Stacks{Goroutines: all.Count(), Text: text.String()}, err
}
