package cluster

import (
	"context"
	"fmt"
	"maps"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/doppel-dev/doppel/lab/internal/ns"
	"github.com/doppel-dev/doppel/lab/internal/state"
)

// Restart kills a server of the lab and starts it again. The caller holds the lab's lock.
func Restart(ctx context.Context, lab *state.Lab, name string) error {
	server, ok := lab.Servers[name]
	if !ok {
		return fmt.Errorf("there is no server %q: it has %s", name, strings.Join(slices.Sorted(maps.Keys(lab.Servers)), ", "))
	}
	holder := lab.Nodes[server.Node]
	if err := runInNode(holder, nil, "kill", "-KILL", strconv.Itoa(server.Process.PID)); err != nil {
		return err
	}
	for !ns.ReapedInside(holder, server.Process) { // before, its port may be taken
		select {
		case <-ctx.Done():
			return context.Cause(ctx)
		case <-time.After(5 * time.Millisecond):
		}
	}
	p, err := ns.Detach(holder, logPath(lab, name), serverEnv(), server.Argv...)
	if err != nil {
		return blame(lab, name, err)
	}
	server.Process = p
	lab.Servers[name] = server
	return lab.Save()
}
