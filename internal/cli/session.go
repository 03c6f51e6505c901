package cli

import (
	"context"
	"errors"
	"fmt"
	"io"
	"slices"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"github.com/doppel-dev/doppel/internal/buildinfo"
	"github.com/doppel-dev/doppel/internal/localapi"
	"github.com/doppel-dev/doppel/internal/rootapi"
	"github.com/doppel-dev/doppel/internal/spawn"
	"github.com/doppel-dev/doppel/internal/uerr"
)

func (a *app) quitCmd() *cobra.Command {
	var req localapi.QuitRequest
	c := &cobra.Command{
		Use:   "quit",
		Short: "End the session; with -s the daemons too",
		Args:  cobra.NoArgs,
		RunE:  func(c *cobra.Command, _ []string) error { return a.quitRun(c.Context(), req) },
	}
	c.Flags().BoolVarP(&req.Stop, "stop-daemons", "s", false, "stop the user daemon and the root daemon as well")
	useFlag(c.Flags(), &req.Use, "all")
	return c
}

func (a *app) quitRun(ctx context.Context, req localapi.QuitRequest) error {
	var err error
	if req.Stop && req.Use != "" {
		return uerr.New(uerr.Usage, "leave out one of the two", "--stop-daemons ends all connections, --use names one")
	}
	if req.Stop {
		err = a.stopDaemons(ctx, false)
	} else if err = a.call(ctx, localapi.MethodQuit, req, nil); errors.Is(err, localapi.ErrNoDaemon) && req.Use == "" {
		err = nil
	}
	if err != nil {
		return err
	}
	return a.print(localapi.Empty{}, func(w io.Writer) { fmt.Fprintln(w, "Disconnected") })
}

// stopDaemons ends the sessions and both daemons, and waits until they are gone. With ifIdle it is content if one goes on because it is in use.
func (a *app) stopDaemons(ctx context.Context, ifIdle bool) error {
	pids := a.daemonPIDs(ctx)
	var res localapi.QuitResult
	err := a.call(ctx, localapi.MethodQuit, localapi.QuitRequest{Stop: true, IfIdle: ifIdle}, &res)
	if errors.Is(err, localapi.ErrNoDaemon) {
		res.Kept, err = rootapi.Stop(ctx, spawn.RootSocket(), ifIdle) // left alone by a user daemon that was killed
	}
	if err != nil || res.Kept {
		return err
	}
	return spawn.WaitStopped(ctx, pids...)
}

// pidTimeout bounds the question who the daemons are.
const pidTimeout = 2 * time.Second

// daemonPIDs are the processes of the daemons that run, but for a root daemon that stays: the system's service.
func (a *app) daemonPIDs(ctx context.Context) (pids []int) {
	ctx, cancel := context.WithTimeout(ctx, pidTimeout) // one that hangs keeps the others from nothing
	defer cancel()
	var st localapi.Status
	if err := a.client.Call(ctx, localapi.MethodStatus, localapi.StatusRequest{}, &st, nil); err == nil {
		pids = append(pids, st.PID)
	}
	if v, err := rootapi.Running(ctx, spawn.RootSocket()); err == nil && !v.Service {
		pids = append(pids, v.PID)
	}
	return pids
}

// rootDaemon says which root daemon runs, or "not running"; the error is why none can be used that is there.
func rootDaemon(ctx context.Context) (string, error) {
	ctx, cancel := context.WithTimeout(ctx, pidTimeout)
	defer cancel()
	v, err := rootapi.Running(ctx, spawn.RootSocket())
	if errors.Is(err, rootapi.ErrNotRunning) {
		return "not running", nil
	}
	if err != nil {
		return "not answering: " + oneLine(err.Error()), uerr.Wrap(err, uerr.Internal, "end it with: doppel quit -s", "doppel-rootd does not answer")
	}
	text := fmt.Sprintf("running (%s, pid %d", v.Program, v.PID)
	if v.Service {
		text += ", the system's service"
	}
	err = v.Fits()
	if err != nil {
		text += "; of another release: " + uerr.From(err).Hint
	}
	return text + ")", err
}

func (a *app) statusCmd() *cobra.Command {
	var req localapi.StatusRequest
	c := &cobra.Command{
		Use:   "status",
		Short: "Show what runs and what this machine is connected to",
		Args:  cobra.NoArgs,
		RunE:  func(c *cobra.Command, _ []string) error { return a.statusRun(c.Context(), req) },
	}
	useFlag(c.Flags(), &req.Use, "all")
	return c
}

// statusOutput is the JSON form of status.
type statusOutput struct {
	localapi.Status
	UserDaemon string `json:"userDaemon"`
	RootDaemon string `json:"rootDaemon"`
	// Logins are where this machine is logged in to make previews.
	Logins []relayLine `json:"logins,omitempty"`
}

func (a *app) statusRun(ctx context.Context, req localapi.StatusRequest) error {
	out := statusOutput{Logins: a.relayLines(ctx)}
	out.RootDaemon, _ = rootDaemon(ctx)
	err := a.client.Call(ctx, localapi.MethodStatus, req, &out.Status, nil)
	switch {
	case errors.Is(err, localapi.ErrNoDaemon):
		out.UserDaemon = "not running"
	case err != nil:
		return err
	default:
		out.UserDaemon = fmt.Sprintf("running (%s, pid %d)", out.Version, out.PID)
	}
	return a.print(out, func(w io.Writer) { writeStatus(w, out) })
}

func writeStatus(w io.Writer, o statusOutput) {
	fmt.Fprintf(w, "User daemon: %s\n", o.UserDaemon)
	if o.LogFile != "" {
		fmt.Fprintf(w, "   Log        : %s\n", o.LogFile)
	}
	fmt.Fprintf(w, "Root daemon: %s\n", o.RootDaemon)
	for _, l := range o.Logins {
		fmt.Fprintf(w, "Relay      : %s\n", l)
	}
	for _, r := range o.Relays {
		writeRelay(w, r)
	}
	if !o.Connected || o.Session == nil {
		fmt.Fprintln(w, "Not connected")
		if o.Ended != "" {
			fmt.Fprintf(w, "   The last session ended: %s\n", o.Ended)
		}
		return
	}
	if len(o.Others) == 0 {
		writeSession(w, o.Session, "", o.Root)
		return
	}
	for _, s := range append([]localapi.Session{*o.Session}, o.Others...) {
		writeSession(w, &s, " as "+s.Connection, nil)
	}
	fmt.Fprintln(w, "All connections")
	writeNetwork(w, o.Root, o.Session.Flows, nil)
}

// writeSession writes one connection; root is nil where the network is written for several together.
func writeSession(w io.Writer, s *localapi.Session, as string, root *localapi.RootStatus) {
	fmt.Fprintf(w, "Connected%s to context %s, namespace %s (%s)\n", as, s.Context, s.Namespace, s.Server)
	fmt.Fprintf(w, "   User       : %s\n", s.User)
	fmt.Fprintf(w, "   Session    : %s in namespace %s\n", s.Name, s.ManagerNamespace)
	fmt.Fprintf(w, "   Manager    : %s\n", s.ManagerVersion)
	fmt.Fprintf(w, "   Tunnel     : %s%s\n", s.Tunnel, latency(s))
	if s.Transport.Name != "" {
		fmt.Fprintf(w, "   Transport  : %s%s\n", s.Transport.Name, inBrackets(s.Transport.Why))
	}
	for _, f := range s.Transport.Failed {
		fmt.Fprintf(w, "      not by %s: %s\n", f.Name, f.Why)
	}
	fmt.Fprintf(w, "   Reaches    : %s\n", reaches(s.Reach))
	if as == "" {
		writeNetwork(w, root, s.Flows, s.Subnets)
	} else {
		writeSubnets(w, s.Subnets)
	}
	for _, p := range s.Problems {
		fmt.Fprintf(w, "   Problem    : %s\n", p)
	}
	fmt.Fprintf(w, "Intercepts: %d\n", len(s.Intercepts))
	for _, i := range s.Intercepts {
		fmt.Fprintf(w, "   %s: %s, %s\n", i.Name, i.State, portsLine(i))
	}
}

// writeNetwork writes what this machine's network is.
func writeNetwork(w io.Writer, r *localapi.RootStatus, f *localapi.Flows, subnets []localapi.Subnet) {
	if r != nil {
		routes := make([]string, len(r.Routes))
		for i, p := range r.Routes {
			routes[i] = p.String()
		}
		fmt.Fprintf(w, "   Interface  : %s\n", r.Interface)
		fmt.Fprintf(w, "   Routes     : %s\n", strings.Join(routes, ", "))
		writeSubnets(w, subnets)
		fmt.Fprintf(w, "   DNS        : %s (%s), other names from %s\n", r.DNS, r.DNSReason, strings.Join(r.Resolvers, ", "))
	}
	if f != nil {
		fmt.Fprintf(w, "   Flows      : %d TCP and %d UDP open, %d in all; %s up, %s down\n", f.TCPOpen, f.UDPOpen, f.Total, size(f.UpBytes), size(f.DownBytes))
	}
}

func writeSubnets(w io.Writer, list []localapi.Subnet) {
	for _, sn := range list {
		if note := subnetNote(sn); note != "" {
			fmt.Fprintf(w, "   Subnet     : %s\n", note)
		}
	}
}

// latency is the tunnel's round trip in brackets, if it was measured.
func latency(s *localapi.Session) string {
	if s.LatencyMS == 0 {
		return ""
	}
	return fmt.Sprintf(" (%.1f ms)", s.LatencyMS)
}

// inBrackets is s in brackets, behind a space, or nothing.
func inBrackets(s string) string {
	if s == "" {
		return ""
	}
	return " (" + s + ")"
}

// maxReaches is how many namespaces status lists; -o json has them all.
const maxReaches = 8

func reaches(r localapi.Reach) string {
	if slices.Contains(r.Namespaces, "*") {
		return "the whole cluster"
	}
	var parts []string
	switch n := len(r.Namespaces); {
	case n == 1:
		parts = append(parts, "namespace "+r.Namespaces[0])
	case n > maxReaches:
		parts = append(parts, fmt.Sprintf("namespaces %s and %d more", strings.Join(r.Namespaces[:maxReaches], ", "), n-maxReaches))
	case n > 1:
		parts = append(parts, "namespaces "+strings.Join(r.Namespaces, ", "))
	}
	if r.Outside {
		parts = append(parts, "nodes and what lies beyond the cluster")
	}
	if len(parts) == 0 {
		return "nothing"
	}
	return strings.Join(parts, ", ")
}

// size is a number of bytes for people.
func size(n uint64) string {
	f, unit := float64(n), 0
	for f >= 1000 && unit < 4 {
		f, unit = f/1000, unit+1
	}
	return strings.TrimSuffix(fmt.Sprintf("%.1f", f), ".0") + " " + []string{"B", "kB", "MB", "GB", "TB"}[unit]
}

func (a *app) versionCmd() *cobra.Command {
	return &cobra.Command{
		Use:   "version",
		Short: "Show the versions of this program, the daemons and the traffic-manager",
		Args:  cobra.NoArgs,
		RunE:  func(c *cobra.Command, _ []string) error { return a.versionRun(c.Context()) },
	}
}

// versionOutput is the JSON form of version.
type versionOutput struct {
	Client         string `json:"client"`
	UserDaemon     string `json:"userDaemon"`
	RootDaemon     string `json:"rootDaemon"`
	TrafficManager string `json:"trafficManager"`
}

func (a *app) versionRun(ctx context.Context) error {
	out := versionOutput{Client: buildinfo.String(), UserDaemon: "not running", TrafficManager: "not connected"}
	out.RootDaemon, _ = rootDaemon(ctx)
	var st localapi.Status
	switch err := a.client.Call(ctx, localapi.MethodStatus, localapi.Empty{}, &st, nil); {
	case err != nil && !errors.Is(err, localapi.ErrNoDaemon):
		out.UserDaemon = "not answering: " + oneLine(err.Error())
	case err == nil:
		out.UserDaemon = st.Version
		if st.Session != nil {
			out.TrafficManager = st.Session.ManagerVersion
		}
	}
	return a.print(out, func(w io.Writer) {
		fmt.Fprintf(w, "doppel         : %s\nUser daemon    : %s\nRoot daemon    : %s\nTraffic-manager: %s\n", out.Client, out.UserDaemon, out.RootDaemon, out.TrafficManager)
	})
}
