package cli

import (
	"fmt"
	"io"

	"github.com/spf13/cobra"

	"github.com/doppel-dev/doppel/internal/localapi"
	"github.com/doppel-dev/doppel/internal/relayapi"
	"github.com/doppel-dev/doppel/internal/uerr"
)

func (a *app) relayAllowCmd() *cobra.Command {
	c := &cobra.Command{
		Use:   "allow [URL]",
		Short: "Let a relay start intercepts on this machine, when you ask for them on its pages",
		Long: `Allow lets a relay start intercepts on this machine, when you ask for them on its pages while this machine is connected. It is asked once for each
relay and account, and remembered. The relay gets to list workloads and to intercept what you may, to any TCP port of this machine's loopback: allow
it to a relay that you trust as much as yourself. It gets no files, and runs no program. What waits for your permission, doppel status shows.`,
	}
	return a.permit(c, relayapi.Allowed, "%s may start intercepts on this machine. Take it back with: doppel relay deny %[1]s\n")
}

func (a *app) relayDenyCmd() *cobra.Command {
	c := &cobra.Command{Use: "deny [URL]", Short: "Let a relay start no intercepts on this machine; those that there are stay"}
	return a.permit(c, relayapi.Denied, "%s may not start intercepts on this machine\n")
}

// permit is a command that says what a relay may.
func (a *app) permit(c *cobra.Command, p relayapi.Permission, done string) *cobra.Command {
	c.Args = cobra.MaximumNArgs(1)
	c.RunE = func(c *cobra.Command, args []string) error {
		logins, err := a.logins()
		if err != nil {
			return err
		}
		named := ""
		if len(args) > 0 {
			named = args[0]
		}
		relay, err := a.relayURL(c.Context(), named, logins)
		if err != nil {
			return err
		}
		found, err := logins.Permit(relay, p)
		if err == nil && !found {
			err = uerr.New(uerr.Denied, "log in with: doppel login "+relay, "not logged in at %s", relay)
		}
		if err != nil {
			return err
		}
		return a.print(localapi.RelayState{URL: relay, Permission: string(p)}, func(w io.Writer) { fmt.Fprintf(w, done, relay) })
	}
	return c
}

// writeRelay says what a relay wants of this machine.
func writeRelay(w io.Writer, r localapi.RelayState) {
	switch {
	case !r.Joined && r.Problem != "":
		fmt.Fprintf(w, "   Not joined : %s\n", oneLine(r.Problem))
	case r.Permission == string(relayapi.Allowed):
		fmt.Fprintf(w, "   Its pages  : %s may start intercepts here\n", r.URL)
	}
	for _, wish := range r.Waiting {
		fmt.Fprintf(w, "   Asks       : %s is asked on its pages to intercept %s\n", r.URL, oneLine(wish))
	}
	if len(r.Waiting) > 0 {
		fmt.Fprintf(w, "                Was it you? Allow it with: doppel relay allow %s\n", r.URL)
	}
}
