package cli

import (
	"context"
	"fmt"
	"net/netip"
	"strings"

	"github.com/doppel-dev/doppel/internal/kube"
	"github.com/doppel-dev/doppel/internal/localapi"
	"github.com/doppel-dev/doppel/internal/osroute"
	"github.com/doppel-dev/doppel/internal/subnets"
)

// checkSubnets decides about the cluster's subnets as connect would, as far as the user may see them.
func checkSubnets(ctx context.Context, c *checkup, cluster *kube.Cluster) {
	c.show("Comparing the cluster's subnets with this machine's routes")
	services, pods, err := cluster.Subnets(ctx)
	if err != nil {
		c.add("subnets", checkSkip, "compared with this machine's routes when you connect: "+oneLine(err.Error()), "")
		return
	}
	others, err := osroute.Existings("")
	if err != nil {
		c.failed("subnets", err)
		return
	}
	plan := subnets.Decide(subnets.Facts{Clusters: []subnets.Cluster{{Services: services, Pods: pods}}, Others: others})
	var list []localapi.Subnet
	for _, s := range plan.Subnets {
		list = append(list, localapi.Subnet{Kind: string(s.Kind), Real: s.Real, Virtual: s.Virtual, Way: string(s.Way), Why: s.Why})
	}
	c.list = append(c.list, judgeSubnets(list))
}

// judgeSubnets says which of the cluster's subnets this machine has routes for. What the user asked for is no conflict, and neither is a node
// on this machine's own network.
func judgeSubnets(list []localapi.Subnet) check {
	var fine, conflicts []string
	var allow []netip.Prefix
	for _, s := range list {
		switch {
		case s.Kind == string(subnets.Node):
		case s.Way != string(subnets.Routed) && strings.HasPrefix(s.Why, "overlaps "):
			conflicts = append(conflicts, fmt.Sprintf("%v %s", s.Real, s.Why))
			allow = append(allow, s.Real)
		default:
			fine = append(fine, s.Real.String())
		}
	}
	if len(conflicts) == 0 {
		return check{Name: "subnets", State: checkOK, Detail: strings.Join(fine, ", ") + ": nothing of this machine's is in the way"}
	}
	var flags []string
	for _, p := range allow {
		flags = append(flags, p.String())
	}
	return check{
		Name: "subnets", State: checkWarn, Detail: strings.Join(conflicts, "; "),
		Fix: "nothing has to be done: names lead to virtual addresses. For the cluster's own addresses instead of this machine's: --allow-conflicting-subnets " + strings.Join(flags, ","),
	}
}
