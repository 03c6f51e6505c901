package userd

import (
	"context"
	"slices"
	"strings"

	"github.com/doppel-dev/doppel/internal/kube"
	"github.com/doppel-dev/doppel/internal/uerr"
)

// refuseUnmanaged refuses an intercept in a namespace that the session's manager is not for: nobody would look at the object. The
// manager's list may be longer than it was when this session began.
func refuseUnmanaged(ctx context.Context, c *kube.Cluster, m kube.ManagerInfo, managerNS, ns string) error {
	if len(m.Namespaces) == 0 || slices.Contains(m.Namespaces, ns) {
		return nil
	}
	now, err := c.Manager(ctx, managerNS)
	if err != nil {
		return err
	}
	if len(now.Namespaces) == 0 || slices.Contains(now.Namespaces, ns) {
		return nil
	}
	return uerr.New(uerr.Denied, "choose a namespace of it with -n, or connect through another traffic-manager with --manager-namespace",
		"namespace %s is not one of those that the traffic-manager in %s is for (%s)", ns, managerNS, strings.Join(now.Namespaces, ", "))
}
