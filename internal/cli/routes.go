package cli

import (
	"cmp"
	"context"
	"fmt"
	"io"
	"net/netip"
	"text/tabwriter"

	"github.com/spf13/cobra"
	"github.com/spf13/pflag"

	"github.com/doppel-dev/doppel/internal/localapi"
	"github.com/doppel-dev/doppel/internal/uerr"
)

// networkFlags are the options for a session's subnets.
type networkFlags struct {
	also, never, allow, vnat, via []string
	virtual                       netip.Prefix // has no flag
}

func (n *networkFlags) add(f *pflag.FlagSet) {
	f.StringSliceVar(&n.also, "also-proxy", nil, "subnets that are reached through the cluster as well")
	f.StringSliceVar(&n.never, "never-proxy", nil, "subnets that are never reached through the cluster; the longer prefix decides against --also-proxy")
	f.StringSliceVar(&n.allow, "allow-conflicting-subnets", nil, "subnets that the cluster may have although this machine has routes there")
	f.StringSliceVar(&n.vnat, "vnat", nil, "subnets (or service, pods, also, all) that get virtual addresses here, conflict or not")
	f.StringSliceVar(&n.via, "proxy-via", nil, "SUBNET=WORKLOAD: connections to the subnet (or service, pods, also, all) leave from that workload's pods")
}

// configured puts the user's configuration in the places of flags.
func (n *networkFlags) configured(o localapi.NetworkOptions) {
	for _, l := range []struct {
		from []netip.Prefix
		to   *[]string
	}{{o.AlsoProxy, &n.also}, {o.NeverProxy, &n.never}, {o.AllowConflicting, &n.allow}} {
		for _, p := range l.from {
			*l.to = append(*l.to, p.String())
		}
	}
	n.vnat, n.via, n.virtual = o.VNAT, o.ProxyVia, o.VirtualSubnet
}

func (n *networkFlags) options() (o localapi.NetworkOptions, err error) {
	o.VNAT, o.ProxyVia, o.VirtualSubnet = n.vnat, n.via, n.virtual
	for _, l := range []struct {
		flag string
		from []string
		to   *[]netip.Prefix
	}{{"also-proxy", n.also, &o.AlsoProxy}, {"never-proxy", n.never, &o.NeverProxy}, {"allow-conflicting-subnets", n.allow, &o.AllowConflicting}} {
		for _, text := range l.from {
			p, err := parseSubnet(text)
			if err != nil {
				return o, uerr.New(uerr.Usage, "write it like 10.1.0.0/16", "--%s: %q is no subnet", l.flag, text)
			}
			*l.to = append(*l.to, p)
		}
	}
	return o, nil
}

// parseSubnet reads a subnet, or an address as one of its own. Host bits are dropped, as in ip route.
func parseSubnet(text string) (netip.Prefix, error) {
	if a, err := netip.ParseAddr(text); err == nil {
		return a.WithZone("").Prefix(a.BitLen())
	}
	p, err := netip.ParsePrefix(text)
	return p.Masked(), err
}

// subnetNote says what is unexpected about a subnet, or "".
func subnetNote(s localapi.Subnet) string {
	switch {
	case s.Kind == "node" && s.Way == "kept out":
		return "" // usual where nodes and this machine are on one network
	case s.Virtual.IsValid():
		return fmt.Sprintf("%v is %v on this machine: %s", s.Real, s.Virtual, s.Why)
	case s.Why != "":
		return fmt.Sprintf("%v is %s: %s", s.Real, s.Way, s.Why)
	}
	return ""
}

func (a *app) routesCmd() *cobra.Command {
	var req localapi.StatusRequest
	c := &cobra.Command{
		Use:   "routes",
		Short: "Show which subnets of the cluster are reached, by which addresses, and why",
		Long: `Routes shows each subnet of the cluster and what became of it on this machine.

A subnet that overlaps a route of this machine (of a VPN, a container bridge, the local network) is mapped: on this machine it has virtual
addresses, which DNS answers for the cluster's names. Connect's --allow-conflicting-subnets gives it its own addresses in spite of that.`,
		Args: cobra.NoArgs,
		RunE: func(c *cobra.Command, _ []string) error { return a.routesRun(c.Context(), req) },
	}
	useFlag(c.Flags(), &req.Use, "all")
	return c
}

// routesOutput is the JSON form of routes.
type routesOutput struct {
	Subnets []localapi.Subnet `json:"subnets"`
	// Others are the subnets of further connections.
	Others []connectionSubnets `json:"others,omitempty"`
	// Interface and Routes are what this machine's routing table has of it.
	Interface string         `json:"interface"`
	Routes    []netip.Prefix `json:"routes"`
}

type connectionSubnets struct {
	Connection string            `json:"connection"`
	Subnets    []localapi.Subnet `json:"subnets"`
}

func (a *app) routesRun(ctx context.Context, req localapi.StatusRequest) error {
	var st localapi.Status
	if err := a.client.Call(ctx, localapi.MethodStatus, req, &st, nil); err != nil {
		return err
	}
	if st.Session == nil || st.Root == nil {
		return localapi.ErrNoDaemon
	}
	out := routesOutput{Subnets: st.Session.Subnets, Interface: st.Root.Interface, Routes: st.Root.Routes}
	for _, s := range st.Others {
		out.Others = append(out.Others, connectionSubnets{s.Connection, s.Subnets})
	}
	return a.print(out, func(w io.Writer) {
		if len(out.Others) == 0 {
			writeRoutes(w, out.Subnets)
			return
		}
		for _, c := range append([]connectionSubnets{{st.Session.Connection, out.Subnets}}, out.Others...) {
			fmt.Fprintf(w, "Connection %s\n", c.Connection)
			writeRoutes(w, c.Subnets)
		}
	})
}

func writeRoutes(w io.Writer, list []localapi.Subnet) {
	t := tabwriter.NewWriter(w, 0, 0, 2, ' ', 0)
	fmt.Fprintln(t, "CLUSTER\tHERE\tKIND\tWAY\tFROM\tWHY")
	for _, s := range list {
		fmt.Fprintf(t, "%v\t%s\t%s\t%s\t%s\t%s\n", s.Real, here(s), s.Kind, s.Way, cmp.Or(s.Workload, "-"), cmp.Or(s.Why, "-"))
	}
	_ = t.Flush() // to the terminal, as every line that is printed
}

// here is what a subnet is called on this machine.
func here(s localapi.Subnet) string {
	switch {
	case s.Virtual.IsValid():
		return s.Virtual.String()
	case s.Way == "kept out":
		return "-"
	}
	return s.Real.String()
}
