// Package helm owns the way to doppel-helm, the program that has Helm and the chart in it: what it is asked, and what it says.
//
// Helm would be half of doppel otherwise, every command would start with it, and the user daemon keep it in memory.
package helm

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"syscall"
	"time"

	"github.com/doppel-dev/doppel/internal/buildinfo"
	"github.com/doppel-dev/doppel/internal/kube"
	"github.com/doppel-dev/doppel/internal/localapi"
	"github.com/doppel-dev/doppel/internal/uerr"
)

const (
	// Program is the file name; it lies beside the doppel program or in PATH.
	Program = "doppel-helm"
	// DefaultNamespace is where the manager goes when nobody says otherwise.
	DefaultNamespace = kube.DefaultManagerNamespace
	// DefaultTimeout bounds an install or upgrade, waiting included.
	DefaultTimeout = 2 * time.Minute
)

// Verb is what is to be done with the chart.
type Verb string

// The verbs. Ensure is an install that is content with a traffic-manager that somebody else installs meanwhile, Remove an uninstall that is with none,
// and Removable asks before whether it would be one that is not ours.
const (
	Install   Verb = "install"
	Upgrade   Verb = "upgrade"
	Uninstall Verb = "uninstall"
	Ensure    Verb = "ensure"
	Remove    Verb = "remove"
	Removable Verb = "removable"
)

// Request is what doppel-helm is asked, as its only argument: its input stays the terminal, which credential plugins may want.
type Request struct {
	Version string       `json:"version"` // of who asks
	Verb    Verb         `json:"verb"`
	Cluster kube.Options `json:"cluster"`
	Options
}

// Options are those of the chart: see chart.Options.
type Options struct {
	Namespace       string        `json:"namespace,omitempty"`
	ValueFiles      []string      `json:"valueFiles,omitempty"`
	Set             []string      `json:"set,omitempty"`
	SetString       []string      `json:"setString,omitempty"`
	CreateNamespace bool          `json:"createNamespace,omitempty"`
	Wait            bool          `json:"wait,omitempty"`
	Timeout         time.Duration `json:"timeout,omitempty"`
	ResetValues     bool          `json:"resetValues,omitempty"`
}

// Run has the program do something. If ctx ends it is told so, and waited for: what it has begun it takes back.
func Run(ctx context.Context, program string, r Request, progress func(string)) error {
	r.Version = buildinfo.Version
	arg, err := json.Marshal(r)
	if err != nil {
		return err
	}
	cmd := exec.CommandContext(ctx, program, string(arg))
	cmd.Cancel = func() error { return cmd.Process.Signal(syscall.SIGTERM) }
	cmd.Stdin, cmd.Stderr = os.Stdin, os.Stderr
	out, err := cmd.StdoutPipe()
	if err != nil {
		return err
	}
	if err := cmd.Start(); err != nil {
		return uerr.Wrap(err, uerr.Usage, "install it again beside the doppel program", "run %s", program)
	}
	answer := listen(out, progress)
	if err := cmd.Wait(); answer == nil && err != nil {
		answer = err
	}
	if errors.Is(answer, io.EOF) {
		answer = errors.New("it has ended without an answer")
	}
	var said *uerr.Error
	if answer != nil && !errors.As(answer, &said) {
		return fmt.Errorf("%s: %w", Program, answer)
	}
	return answer
}

// listen reads what the program says until its answer; io.EOF is none.
func listen(out io.Reader, progress func(string)) error {
	for dec := json.NewDecoder(out); ; {
		var e localapi.Event
		switch err := dec.Decode(&e); {
		case err != nil:
			return err
		case e.Error != nil:
			return e.Error
		case e.Result != nil:
			return nil
		}
		progress(e.Progress)
	}
}

// Serve is the other side: it answers the request in args on out by do, and returns the exit code.
func Serve(ctx context.Context, args []string, out io.Writer, do func(context.Context, Request, func(string)) error) int {
	enc := json.NewEncoder(out)
	var r Request
	err := errors.New("doppel-helm is run by doppel: see doppel helm --help")
	if len(args) == 1 {
		dec := json.NewDecoder(bytes.NewReader([]byte(args[0])))
		dec.DisallowUnknownFields()
		err = dec.Decode(&r)
	}
	switch {
	case len(args) == 1 && r.Version != buildinfo.Version:
		err = uerr.New(uerr.Conflict, "install both of the same release", "this doppel-helm is of version %s", buildinfo.Version)
	case err == nil:
		err = do(ctx, r, func(s string) { _ = enc.Encode(localapi.Event{Progress: s}) })
	}
	if err != nil {
		_ = enc.Encode(localapi.Event{Error: uerr.From(err)})
		return 1
	}
	_ = enc.Encode(localapi.Event{Result: json.RawMessage("{}")})
	return 0
}
