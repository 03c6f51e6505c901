package cli

import (
	"context"
	"io"
	"os"
	"time"

	"github.com/spf13/cobra"

	"github.com/doppel-dev/doppel/internal/footprint"
	"github.com/doppel-dev/doppel/internal/localapi"
	"github.com/doppel-dev/doppel/internal/relayclient"
	"github.com/doppel-dev/doppel/internal/rootapi"
	"github.com/doppel-dev/doppel/internal/sched"
	"github.com/doppel-dev/doppel/internal/spawn"
	"github.com/doppel-dev/doppel/internal/userd"
	"github.com/doppel-dev/doppel/internal/xlog"
)

// maxLog is the size at which a log of an earlier run is begun anew.
const maxLog = 5 << 20

func (a *app) daemonCmd() *cobra.Command {
	var logFile string
	c := &cobra.Command{
		Use:    "daemon",
		Short:  "Run the user daemon in the foreground (connect starts it by itself)",
		Args:   cobra.NoArgs,
		Hidden: true,
		RunE: func(c *cobra.Command, _ []string) error {
			w := io.Writer(a.Err)
			if logFile != "" {
				f, err := openLog(logFile)
				if err != nil {
					return err
				}
				defer f.Close()
				w = f
			}
			log, level := xlog.New(w, "doppel")
			d, err := userd.New(userd.Config{
				Socket: localapi.DaemonSocket(), LogFile: logFile, Log: log, Level: level,
				RootSocket: spawn.RootSocket, Root: connectRoot, Logins: func() ([]relayclient.Login, error) {
					l, err := a.logins()
					if err != nil {
						return nil, err
					}
					return l.Logins, nil
				},
			})
			if err != nil {
				return err
			}
			go footprint.Keep(c.Context())
			sched.Batch(log)
			sched.Half()
			if err := d.Run(c.Context()); err != nil {
				log.Error("ended", "err", err)
				return err
			}
			return nil
		},
	}
	c.Flags().StringVar(&logFile, "log", "", "log file (default: stderr)")
	return c
}

func openLog(path string) (*os.File, error) {
	mode := os.O_CREATE | os.O_WRONLY | os.O_APPEND
	if st, err := os.Stat(path); err == nil && st.Size() > maxLog {
		mode = os.O_CREATE | os.O_WRONLY | os.O_TRUNC
	}
	return os.OpenFile(path, mode, 0o600)
}

// connectRoot connects to the root daemon; one that is gone is started again if that takes no password.
func connectRoot(ctx context.Context, o rootapi.Options) (*rootapi.Client, error) {
	ctx, cancel := context.WithTimeout(ctx, 10*time.Second)
	defer cancel()
	if _, err := spawn.RootDaemon(ctx, spawn.Root{}); err != nil {
		return nil, err
	}
	return rootapi.Dial(ctx, spawn.RootSocket(), o)
}
