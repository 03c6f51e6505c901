package cli

import (
	"context"
	"errors"
	"fmt"
	"io"
	"time"

	"github.com/spf13/cobra"

	"github.com/doppel-dev/doppel/internal/kube"
	"github.com/doppel-dev/doppel/internal/localapi"
	"github.com/doppel-dev/doppel/internal/uerr"
	"github.com/doppel-dev/doppel/internal/xlog"
)

// defaultLevelTime is how long another log level lasts: nobody remembers to set it back.
const defaultLevelTime = 30 * time.Minute

// levelFlags are the flags of loglevel.
type levelFlags struct {
	kubeFlags
	lasts         time.Duration
	local, remote bool
}

func (a *app) loglevelCmd() *cobra.Command {
	var f levelFlags
	c := &cobra.Command{
		Use:   "loglevel {error | warn | info | debug | reset}",
		Short: "Change how much the daemons, the traffic-manager and the agents log, for a time",
		Long: `Loglevel changes how much the two daemons of this machine and, in the cluster, the traffic-manager and all agents log. After the time
of --for each logs again as before, and with reset at the level that it was started with. The cluster's part concerns everybody and needs the right
to change ConfigMap traffic-manager-logging (role doppel-admin); it takes up to 5 s.`,
		Args: cobra.ExactArgs(1),
		RunE: func(c *cobra.Command, args []string) error { return a.loglevelRun(c.Context(), args[0], &f) },
	}
	f.add(c.Flags(), false)
	a.configured(&f.kubeFlags)
	c.Flags().DurationVar(&f.lasts, "for", defaultLevelTime, "how long; 0 is until it is changed again")
	c.Flags().BoolVar(&f.local, "local-only", false, "the daemons of this machine only")
	c.Flags().BoolVar(&f.remote, "remote-only", false, "the traffic-manager and the agents only")
	return c
}

// levelOutput is the JSON form of loglevel.
type levelOutput struct {
	Level string `json:"level"`
	Until string `json:"until,omitempty"`
}

func (a *app) loglevelRun(ctx context.Context, level string, f *levelFlags) error {
	if level == "reset" {
		level = ""
	} else if _, err := xlog.ParseLevel(level); err != nil || level == "" {
		return uerr.New(uerr.Usage, "for example: doppel loglevel debug", "%q is no log level: want error, warn, info, debug or reset", level)
	}
	if f.lasts < 0 || f.lasts > maxLevelTime {
		return uerr.New(uerr.Usage, "for example: --for 1h", "--for %v: want 0 to %v", f.lasts, maxLevelTime)
	}
	if f.local && f.remote {
		return uerr.New(uerr.Usage, "without either both are changed", "--local-only and --remote-only exclude each other")
	}
	var until time.Time
	if level != "" && f.lasts > 0 {
		until = time.Now().Add(f.lasts)
	}
	var errs []error
	if !f.remote {
		err := a.call(ctx, localapi.MethodLogLevel, localapi.LogLevelRequest{Level: level, For: f.lasts}, nil)
		if errors.Is(err, localapi.ErrNoDaemon) {
			err = nil // nothing logs
			if f.local {
				err = uerr.New(uerr.NotConnected, "they start with: doppel connect", "the daemons do not run")
			}
		}
		errs = append(errs, err)
	}
	if !f.local {
		errs = append(errs, a.remoteLevel(ctx, f, level, until))
	}
	if err := errors.Join(errs...); err != nil {
		return err
	}
	out := levelOutput{Level: level}
	text := "Logging as at the start\n"
	if level != "" {
		text = "Logging at level " + level + "\n"
	}
	if !until.IsZero() {
		out.Until = until.UTC().Format(time.RFC3339)
		text = fmt.Sprintf("Logging at level %s until %s\n", level, until.Format(time.TimeOnly))
	}
	return a.print(out, func(w io.Writer) { fmt.Fprint(w, text) })
}

// maxLevelTime is what the root daemon takes.
const maxLevelTime = 7 * 24 * time.Hour

func (a *app) remoteLevel(ctx context.Context, f *levelFlags, level string, until time.Time) error {
	if a.configErr != nil {
		return a.configErr
	}
	cluster, err := kube.Load(f.Options)
	if err != nil {
		return err
	}
	err = cluster.SetLogLevel(ctx, f.managerNS, level, until)
	if e := uerr.From(err); e != nil && e.Kind == uerr.Denied {
		e.Hint = "ask for role doppel-admin, or change only this machine's with --local-only"
		return e
	}
	return err
}
