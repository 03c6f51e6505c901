package agent

import (
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"slices"
	"sync/atomic"

	"github.com/doppel-dev/doppel/internal/agentcfg"
	"github.com/doppel-dev/doppel/internal/control"
	"github.com/doppel-dev/doppel/internal/environ"
	"github.com/doppel-dev/doppel/internal/mux"
	"github.com/doppel-dev/doppel/internal/sftpd"
	"github.com/doppel-dev/doppel/internal/wire"
)

// maxFileStreams is how many laptops' file systems an agent serves at once: each may take some megabytes.
const maxFileStreams = 8

// apps shows the environment and the files of containers to the laptops whose intercepts the table names for it.
type apps struct {
	shown   []agentcfg.App
	environ []string // of this process, with the apps' under their prefixes
	table   *table
	log     *slog.Logger
	serving atomic.Int32
}

func (a *apps) of(container string) (agentcfg.App, error) {
	i := slices.IndexFunc(a.shown, func(s agentcfg.App) bool { return s.Container == container })
	if i < 0 {
		return agentcfg.App{}, &mux.RejectError{Code: wire.CodeNotFound, Msg: "the agent does not have container " + container}
	}
	return a.shown[i], nil
}

// environment answers control.ManagerEnvironment.
func (a *apps) environment(body []byte) (control.Environment, error) {
	var ask control.AskEnvironment
	if err := json.Unmarshal(body, &ask); err != nil {
		return control.Environment{}, err
	}
	app, err := a.of(ask.Container)
	if err != nil {
		return control.Environment{}, err
	}
	out := control.Environment{Container: app.Container, Variables: environ.Collect(a.environ, app.Prefix)}
	for _, v := range app.Volumes {
		out.Volumes = append(out.Volumes, control.Volume{Path: v.Path, ReadOnly: v.ReadOnly})
	}
	return out, nil
}

// files serves the volumes of the container of an intercept, until it ends.
func (a *apps) files(r *mux.Request, intercept string) {
	container, ok := a.table.shows(intercept)
	if !ok {
		_ = r.Reject(wire.CodeNotFound, "no such intercept")
		return
	}
	app, err := a.of(container)
	if err != nil {
		_ = r.Reject(wire.CodeNotFound, err.Error())
		return
	}
	if a.serving.Add(1) > maxFileStreams {
		a.serving.Add(-1)
		_ = r.Reject(wire.CodeBusy, fmt.Sprintf("the agent serves files to %d laptops already", maxFileStreams))
		return
	}
	defer a.serving.Add(-1)
	st, err := r.Accept(nil)
	if err != nil {
		return
	}
	exports := make([]sftpd.Export, len(app.Volumes))
	for i, v := range app.Volumes {
		exports[i] = sftpd.Export{Path: v.Path, Dir: v.Dir, ReadOnly: v.ReadOnly}
	}
	check := func() {
		if now, ok := a.table.shows(intercept); !ok || now != container {
			st.Reset()
		}
	}
	defer a.table.subscribe(check)()
	check() // it may have ended before
	if err := sftpd.Serve(st, exports, a.log); err != nil && !errors.Is(err, os.ErrClosed) {
		st.Reset()
	}
}
