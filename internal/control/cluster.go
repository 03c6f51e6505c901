package control

import (
	"maps"
	"net/netip"
	"reflect"
	"slices"
)

// AskCluster is what a laptop wants to be told of the cluster: one that says nothing, as those of version 0.1 do, gets all of it at each change.
type AskCluster struct {
	Changes bool `json:"changes"`
}

// Cluster is what a laptop has to know of the cluster's network and names.
type Cluster struct {
	Domain       string               `json:"domain"`
	ServiceCIDRs []netip.Prefix       `json:"serviceCIDRs"`
	PodCIDRs     []netip.Prefix       `json:"podCIDRs"`
	Nodes        []netip.Addr         `json:"nodes,omitempty"` // but for those where the API server is
	Services     map[string][]Service `json:"services"`        // by namespace; a namespace without services has an empty list
	// Partial says that Services is what has changed since the last message: the namespaces with other services than before, and null for one that is gone.
	Partial bool `json:"partial,omitempty"`

	// ManagerService and ManagerPod are where the manager answers /attach inside the cluster: a laptop that gets there without its tunnel is
	// in the cluster's network already.
	ManagerService netip.AddrPort `json:"managerService,omitzero"`
	ManagerPod     netip.AddrPort `json:"managerPod,omitzero"`
}

// Service is a service's name and whether it is headless.
type Service struct {
	Name     string `json:"name"`
	Headless bool   `json:"headless,omitempty"`
}

// Since is c for whoever has old, and whether there is anything to tell.
func (c Cluster) Since(old Cluster) (Cluster, bool) {
	news := c
	news.Partial, news.Services = true, map[string][]Service{}
	for ns, list := range c.Services {
		if was, ok := old.Services[ns]; !ok || !slices.Equal(was, list) {
			news.Services[ns] = list
		}
	}
	for ns := range old.Services {
		if _, ok := c.Services[ns]; !ok {
			news.Services[ns] = nil
		}
	}
	return news, len(news.Services) > 0 || !reflect.DeepEqual(c.network(), old.network())
}

// After is the whole of what a message says to whoever had old before.
func (c Cluster) After(old Cluster) Cluster {
	if !c.Partial {
		return c
	}
	news := c.Services
	c.Partial, c.Services = false, maps.Clone(old.Services) // others may be reading that
	if c.Services == nil {
		c.Services = map[string][]Service{}
	}
	for ns, list := range news {
		if list == nil {
			delete(c.Services, ns)
		} else {
			c.Services[ns] = list
		}
	}
	return c
}

// network is c without names.
func (c Cluster) network() Cluster {
	c.Services, c.Partial = nil, false
	return c
}
