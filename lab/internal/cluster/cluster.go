// Package cluster brings a whole lab up, tells how it is, and takes it down.
package cluster

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"strings"
	"time"

	"github.com/doppel-dev/doppel/lab/internal/kubeapi"
	"github.com/doppel-dev/doppel/lab/internal/node"
	"github.com/doppel-dev/doppel/lab/internal/ns"
	"github.com/doppel-dev/doppel/lab/internal/pki"
	"github.com/doppel-dev/doppel/lab/internal/state"
)

// serverEnv is the environment of every server; PATH has all that kubelet, containerd and runc call.
func serverEnv() []string {
	return []string{"PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin", "HOME=/"}
}

// Open returns the record of a lab that is up.
func Open(name string) (*state.Lab, error) {
	lab, err := state.Load(name)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, fmt.Errorf("there is no lab %q: start it with: lab up --name %s", name, name)
	}
	if err != nil {
		return nil, err
	}
	if !lab.Ready {
		return nil, fmt.Errorf("lab %q is not ready: start it with: lab up --name %s", name, name)
	}
	return lab, nil
}

// Client returns a client of the lab's API server as the administrator.
func Client(lab *state.Lab) (*kubeapi.Client, error) {
	return kubeapi.New(kubeapi.Config{
		Server: lab.Plan.APIServerURL(), CAFile: lab.Path("pki", "ca.crt"),
		CertFile: lab.Path("pki", "admin.crt"), KeyFile: lab.Path("pki", "admin.key"),
	})
}

// Target is what the lab's kubeconfigs name.
func Target(lab *state.Lab) pki.Target {
	return pki.Target{Name: "lab-" + lab.Plan.Name, Server: lab.Plan.APIServerURL()}
}

// Dead lists what of a lab should run and does not, by name.
func Dead(lab *state.Lab) []string {
	var dead []string
	check := func(name string, alive bool) {
		if !alive {
			dead = append(dead, name)
		}
	}
	check("router", ns.Alive(lab.Wan))
	for _, n := range lab.Plan.AllNodes() {
		check(n.Name, ns.Alive(lab.Nodes[n.Short]))
	}
	for name, s := range lab.Servers {
		check(name, ns.AliveInside(lab.Nodes[s.Node], s.Process))
	}
	return dead
}

// serverError is the failure of one server, with the end of what it logged.
type serverError struct {
	server string
	err    error
	log    string
}

func (e *serverError) Error() string {
	return fmt.Sprintf("%s: %v\nThe end of its log:\n%s", e.server, e.err, e.log)
}

func (e *serverError) Unwrap() error { return e.err }

// blame turns an error into one that names the server and shows the end of its log.
func blame(lab *state.Lab, server string, err error) error {
	if err == nil {
		return nil
	}
	var already *serverError
	if errors.As(err, &already) {
		return err
	}
	return &serverError{server: server, err: err, log: logTail(logPath(lab, server), 15)}
}

func logPath(lab *state.Lab, server string) string {
	return lab.Path("log", strings.ReplaceAll(server, "/", "-")+".log")
}

func logTail(path string, lines int) string {
	b, err := os.ReadFile(path)
	if err != nil {
		return "  (none: " + err.Error() + ")"
	}
	all := strings.Split(strings.TrimSpace(string(b)), "\n")
	all = all[max(0, len(all)-lines):]
	return "  " + strings.Join(all, "\n  ")
}

// runInNode runs a command inside a node and returns its output in the error if it fails.
func runInNode(holder state.Process, stdin io.Reader, argv ...string) error {
	var out bytes.Buffer
	err := ns.Run(holder, ns.Command{Argv: argv, Env: serverEnv(), Stdin: stdin, Stdout: &out, Stderr: &out})
	if err != nil {
		return fmt.Errorf("%s: %w: %s", argv[0], err, strings.TrimSpace(out.String()))
	}
	return nil
}

// LoadImage imports an image archive into every node.
func LoadImage(lab *state.Lab, archive string) error {
	for _, n := range lab.Plan.AllNodes() {
		if err := importImage(lab.Nodes[n.Short], archive); err != nil {
			return fmt.Errorf("load %s into %s: %w", archive, n.Name, err)
		}
	}
	return nil
}

func importImage(holder state.Process, archive string) error {
	f, err := os.Open(archive)
	if err != nil {
		return err
	}
	defer f.Close()
	return runInNode(holder, f, node.Import()...)
}

// poll waits for check with the lab's usual patience, and gives up early if a server has died.
func poll(ctx context.Context, lab *state.Lab, server string, check func(context.Context) error) error {
	ctx, cancel := context.WithTimeoutCause(ctx, 2*time.Minute, errors.New("not ready after 2 minutes"))
	defer cancel()
	alive := func(context.Context) error {
		for name, s := range lab.Servers {
			if !ns.AliveInside(lab.Nodes[s.Node], s.Process) {
				return blame(lab, name, errors.New("it has ended"))
			}
		}
		return nil
	}
	return blame(lab, server, kubeapi.Poll(ctx, 50*time.Millisecond, alive, check))
}
