package kube

import (
	"context"
	"strings"

	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/doppel-dev/doppel/internal/uerr"
)

// listed is what a manager says in its ConfigMap as a list, of namespaces for example; nil: nothing.
func listed(data map[string]string, key string) []string {
	if data[key] == "" {
		return nil
	}
	return strings.Split(data[key], ",")
}

// ManagedNamespaces are those that the manager in a namespace is for, as arguments of the functions that take "" for all. Where there is no manager
// that is everything, unless there is another one elsewhere: its namespaces are none of this one's business.
func (c *Cluster) ManagedNamespaces(ctx context.Context, managerNS string) ([]string, error) {
	ctx, cancel := context.WithTimeout(ctx, requestTimeout)
	defer cancel()
	cm, err := configMaps.get(ctx, c, managerNS, managerName)
	if err == nil {
		if list := listed(cm.Data, "namespaces"); list != nil {
			return list, nil
		}
		return []string{metav1.NamespaceAll}, nil
	}
	if !apierrors.IsNotFound(err) {
		return nil, c.explain(err, "look for the traffic-manager in namespace "+managerNS)
	}
	others, err := deployments.list(ctx, c, metav1.NamespaceAll, "app.kubernetes.io/name="+managerName+",app.kubernetes.io/part-of=doppel")
	if err != nil && !apierrors.IsForbidden(err) {
		return nil, c.explain(err, "look for traffic-managers")
	}
	if err == nil && len(others.Items) > 0 {
		var where []string
		for i := range others.Items {
			where = append(where, others.Items[i].Namespace)
		}
		return nil, uerr.New(uerr.NotFound, "choose one with --manager-namespace", "no traffic-manager in namespace %s; there is one in %s", managerNS, strings.Join(where, ", "))
	}
	return []string{metav1.NamespaceAll}, nil
}
